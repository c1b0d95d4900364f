#include "guest.h"

#include "console.h"
#include "machine.h"
#include "net.h"
#include "shell.h"
#include "text.h"
#include "virtio.h"

/* boot_params.hdr.cmd_line_ptr (Linux, asm/bootparam.h). */
#define CMD_LINE_PTR 0x228

static bool quiet;

void idle(void)
{
    console_flush();
    machine_sleep();
    virtio_serve();
}

/* What follows the prefix in a word, or NULL. */
static const char *after(const char *word, const char *prefix)
{
    while (*prefix)
        if (*word++ != *prefix++)
            return NULL;
    return word;
}

/* SIZE@BASE:IRQ, as Linux has it (virtio 1.3, 4.2.1); we need no more of the size than there always is. */
static void parse_device(const char *text)
{
    uint64_t size, base, line;

    if ((text = scan_number(text, &size))) {
        while (*text && *text != '@' && *text != ' ')
            text++;
        if (*text == '@' && (text = scan_number(text + 1, &base)) && *text == ':' &&
            scan_number(text + 1, &line)) {
            mmio_add(base, line);
            return;
        }
    }
    last_words("a virtio_mmio.device= that makes no sense");
}

/* GUEST:SERVER:GATEWAY:NETMASK, each of which may be empty; the server is nothing to us. */
static void parse_addresses(const char *text)
{
    uint32_t server, *const fields[] = {&net_address, &server, &net_gateway, &net_mask};

    for (unsigned i = 0; i < sizeof fields / sizeof *fields; i++) {
        scan_address(text, fields[i]);
        while (*text && *text != ':' && *text != ' ')
            text++;
        if (*text++ != ':')
            return;
    }
}

static void parse_word(const char *word)
{
    const char *value;

    if ((value = after(word, "virtio_mmio.device=")))
        parse_device(value);
    else if ((value = after(word, "ip=")))
        parse_addresses(value);
    else if ((value = after(word, "quiet")) && (*value == ' ' || !*value))
        quiet = true;
}

static void parse_command_line(const char *line)
{
    for (bool in_word = false; *line; line++) {
        if (*line != ' ' && !in_word)
            parse_word(line);
        in_word = *line != ' ';
    }
}

void guest_main(const uint8_t *boot_params)
{
    const char *command_line = *(const char *const *)(boot_params + CMD_LINE_PTR);

    machine_start(boot_params);
    if (command_line)
        parse_command_line(command_line);
    pci_scan();
    for (struct virtio_device *device = devices; device < devices + device_count; device++)
        virtio_start(device);
    if (!quiet)
        print("lguestlib guest: %u MiB, %u devices; try help\n", machine_memory(), device_count);
    shell();
}
