/* What the machine gives: memory, interrupts, a timer, sleep, and the ways to end. */

#ifndef MACHINE_H
#define MACHINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MICROSECOND 1000u
#define SECOND 1000000000u

/* Takes the memory map from boot_params (Linux, asm/bootparam.h) and enables interrupts. */
void machine_start(const uint8_t *boot_params);

/* MiB of memory in all. */
uint32_t machine_memory(void);

/* Memory for ever, 16-byte aligned, not cleared. */
void *allocate(size_t length);

/* Let the interrupt line, 0 to 23, through to mmio_interrupt(). */
void interrupt_enable(uint32_t line);

/* How many messages pci_interrupt() can tell apart; what each writes, and where (Intel SDM, volume 3, "APIC"). */
#define MESSAGES 64
uint32_t message_address(void);
uint32_t message_data(uint32_t message);

/* Sleep until there has been an interrupt since the last sleep. */
void machine_sleep(void);

/* One timer, in nanoseconds: it wakes machine_sleep() when none are left. */
void timer_start(uint32_t nanoseconds);
uint32_t timer_left(void);
void timer_stop(void);

/* A line for whoever watches the machine from outside. */
void last_words(const char *text, ...);

/* Last words, and the end. */
void die(const char *text) __attribute__((noreturn));

void power_off(uint8_t verdict) __attribute__((noreturn));
void reboot(void) __attribute__((noreturn));

#endif
