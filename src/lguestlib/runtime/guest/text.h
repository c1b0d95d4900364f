/* Numbers and addresses as text, both ways; and the four functions that the compiler calls by itself. */

#ifndef TEXT_H
#define TEXT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Give put() the text with its arguments filled in:
 * %s string; %u and %x 32-bit number, decimal and hexadecimal, a digit before the letter being the
 * width to fill with zeros; %l 64-bit number; %a IPv4 address in network order.
 */
void format(void (*put)(char), const char *text, va_list arguments);

/* Read a decimal or 0x number, or a dotted address: what follows it, or NULL where there is none. */
const char *scan_number(const char *text, uint64_t *value);
const char *scan_address(const char *text, uint32_t *address);

size_t strlen(const char *text);
int strcmp(const char *a, const char *b);
void *memcpy(void *to, const void *from, size_t length);
void *memset(void *to, int byte, size_t length);
int memcmp(const void *a, const void *b, size_t length);

#endif
