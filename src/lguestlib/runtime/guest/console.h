/* The console (virtio 1.3, 5.3): characters in and out. */

#ifndef CONSOLE_H
#define CONSOLE_H

/* The next character of input; sleeps until there is one. */
char console_get(void);

/* Output is collected until it fills a buffer, or console_flush(). */
void console_put(char character);
void console_flush(void);

/* Flush, and sleep until the device has taken everything. */
void console_drain(void);

/* format() to the console. */
void print(const char *text, ...);

#endif
