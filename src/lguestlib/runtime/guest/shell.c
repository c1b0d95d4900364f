#include "shell.h"

#include "console.h"
#include "text.h"

#define CONTROL(letter) ((letter) & 0x1f)
#define BACKSPACE '\b'
#define DELETE 0x7f
#define ESCAPE 0x1b

bool any_failed;

/* Room for a sector's worth of text behind a command. */
static char line[640];
static uint32_t length;

static void erase(void)
{
    if (!length)
        return;
    /* A character of several bytes goes as one (UTF-8). */
    while (--length && (line[length] & 0xc0) == 0x80)
        ;
    print("\b \b");
}

/* Skip what a cursor or function key sends behind ESC: the last character of "[1;5C" is a letter. */
static void skip_escape_sequence(void)
{
    char character = console_get();

    if (character != '[' && character != 'O')
        return;
    do
        character = console_get();
    while (character >= ' ' && character < '@');
}

/* Edit a line until its end; false if it was too long to be kept. */
static bool read_line(void)
{
    static char last;
    bool fits = true;

    length = 0;
    for (;;) {
        char character = console_get(), before = last;

        last = character;
        switch (character) {
        case '\n':
            if (before == '\r')
                continue;
            /* fall through */
        case '\r':
            print("\n");
            line[length] = '\0';
            return fits;
        case BACKSPACE:
        case DELETE:
            erase();
            continue;
        case CONTROL('U'):
            while (length)
                erase();
            fits = true;
            continue;
        case CONTROL('C'):
            print("^C\n");
            length = 0;
            line[0] = '\0';
            return true;
        case ESCAPE:
            skip_escape_sequence();
            continue;
        case '\t':
            character = ' ';
            break;
        }
        if ((uint8_t)character < ' ')
            continue;
        if (length == sizeof line - 1) {
            fits = false;
            continue;
        }
        line[length++] = character;
        console_put(character);
    }
}

char *next_word(char **line)
{
    char *word;

    while (**line == ' ')
        ++*line;
    word = *line;
    while (**line && **line != ' ')
        ++*line;
    if (**line)
        *(*line)++ = '\0';
    return *word ? word : NULL;
}

static bool execute(char *arguments)
{
    char *word = next_word(&arguments);

    if (!word)
        return true;
    for (const struct command *command = commands; command->name; command++)
        if (!strcmp(word, command->name))
            return command->run(arguments);
    print("%s: unknown command; try help\n", word);
    return false;
}

void shell(void)
{
    for (;;) {
        print("> ");
        if (!read_line()) {
            print("the line is too long\n");
            any_failed = true;
        } else if (!execute(line)) {
            any_failed = true;
        }
    }
}
