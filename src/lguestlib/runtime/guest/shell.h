/* The shell: lines from the console, and the commands they name. */

#ifndef SHELL_H
#define SHELL_H

#include <stdbool.h>

/* Prompt, read, execute, for ever. */
void shell(void) __attribute__((noreturn));

/* The next word of a line, ended with a NUL, or NULL; *line moves past it. */
char *next_word(char **line);

struct command {
    const char *name, *arguments, *help;
    /* Whether it has succeeded; it has said so if not. */
    bool (*run)(char *arguments);
};

/* Ended by one without a name. */
extern const struct command commands[];

/* Whether a command has failed since boot. */
extern bool any_failed;

#endif
