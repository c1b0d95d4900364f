#include "block.h"
#include "console.h"
#include "machine.h"
#include "net.h"
#include "rng.h"
#include "shell.h"
#include "text.h"
#include "virtio.h"

#define PINGS_MAX 1000
#define HELP_COLUMN 24

static bool help(char *arguments)
{
    (void)arguments;
    for (const struct command *command = commands; command->name; command++) {
        uint32_t column = strlen(command->name) + 1 + strlen(command->arguments);

        print("  %s %s", command->name, command->arguments);
        for (; column < HELP_COLUMN; column++)
            console_put(' ');
        print("%s\n", command->help);
    }
    return true;
}

/* What is left of a line has to be nothing. */
static bool ends(const char *command, char *arguments)
{
    char *word = next_word(&arguments);

    if (word)
        print("%s: '%s' is one word too many\n", command, word);
    return !word;
}

/* A whole word as a number from low to high. */
static bool is_number(const char *word, uint64_t low, uint64_t high, uint64_t *value)
{
    const char *end = scan_number(word, value);

    return end && !*end && *value >= low && *value <= high;
}

static void print_echo(uint32_t address, const struct echo *echo)
{
    print("reply from %a: %u bytes, %u.%3u us\n", address, echo->length, echo->nanoseconds / MICROSECOND,
          echo->nanoseconds % MICROSECOND);
}

static bool ping(char *arguments)
{
    static struct echo echoes[PINGS_MAX];
    char *address_word = next_word(&arguments), *count_word = next_word(&arguments);
    uint32_t address = net_gateway, next_hop, received = 0;
    const char *end;
    uint64_t count = 1;

    if (address_word && (!(end = scan_address(address_word, &address)) || *end)) {
        print("ping: '%s' is not an address\n", address_word);
        return false;
    }
    if (count_word && !is_number(count_word, 1, PINGS_MAX, &count)) {
        print("ping: '%s' is not a count from 1 to %u\n", count_word, PINGS_MAX);
        return false;
    }
    if (!ends("ping", arguments))
        return false;
    if (!virtio_find(&net_driver, 0)) {
        print("ping: no network\n");
        return false;
    }
    if (!net_address) {
        print("ping: no address of our own; boot with ip=GUEST::GATEWAY:NETMASK\n");
        return false;
    }
    if (!address) {
        print("ping: no gateway; name an address\n");
        return false;
    }
    next_hop = net_next_hop(address);
    if (!net_resolve(next_hop)) {
        print("ping: no such host on the network: %a\n", next_hop);
        return false;
    }
    for (uint32_t sent = 0; sent < count; sent++) {
        if (net_resolve(next_hop) && net_ping(address, next_hop, &echoes[sent])) {
            received++;
        } else {
            echoes[sent].length = 0;
            /* Perhaps the address has moved. */
            net_forget(next_hop);
        }
    }
    /* Told of when all are done, so that the console is silent in between. */
    for (uint32_t sent = 0; sent < count; sent++) {
        if (echoes[sent].length)
            print_echo(address, &echoes[sent]);
        else
            print("no answer from %a\n", address);
    }
    if (count_word)
        print("%u sent, %u received\n", (uint32_t)count, received);
    return received == count;
}

/* The disk named by a word, or the first: NULL if there is none, and then that is said. */
static struct virtio_device *find_disk(const char *command, const char *word)
{
    struct virtio_device *disk;
    uint64_t number = 0;

    if (word && !is_number(word, 0, UINT32_MAX, &number)) {
        print("%s: '%s' is not a disk number\n", command, word);
        return NULL;
    }
    disk = virtio_find(&block_driver, number);
    if (!disk && word)
        print("%s: no disk %l\n", command, number);
    else if (!disk)
        print("%s: no disk\n", command);
    return disk;
}

static bool is_sector(const char *command, const char *word, uint64_t *sector)
{
    if (!word)
        print("%s: which sector?\n", command);
    else if (!is_number(word, 0, UINT64_MAX, sector))
        print("%s: '%s' is not a sector number\n", command, word);
    else
        return true;
    return false;
}

static bool is_on_disk(const char *command, const struct virtio_device *disk, uint64_t sector)
{
    if (sector < disk->capacity)
        return true;
    print("%s: sector %l is past the end of the disk (capacity %l sectors)\n", command, sector,
          disk->capacity);
    return false;
}

static bool succeeded(const char *command, uint8_t status)
{
    if (status == VIRTIO_BLK_S_OK)
        return true;
    if (status == VIRTIO_BLK_S_UNSUPP)
        print("%s: the disk cannot do that\n", command);
    else if (status == BLOCK_LOST)
        print("%s: the disk was reset meanwhile\n", command);
    else
        print("%s: I/O error\n", command);
    return false;
}

/* As hexdump -C has it. */
static void dump(const uint8_t *data)
{
    const uint8_t *previous = NULL;
    bool starred = false;

    for (uint32_t offset = 0; offset < SECTOR_SIZE; offset += 16, previous = data, data += 16) {
        if (previous && !memcmp(previous, data, 16)) {
            if (!starred)
                print("*\n");
            starred = true;
            continue;
        }
        starred = false;
        print("%8x ", offset);
        for (unsigned i = 0; i < 16; i++)
            print(i == 7 ? " %2x " : " %2x", data[i]);
        print("  |");
        for (unsigned i = 0; i < 16; i++)
            console_put(data[i] >= ' ' && data[i] <= '~' ? data[i] : '.');
        print("|\n");
    }
    print("%8x\n", SECTOR_SIZE);
}

static bool read(char *arguments)
{
    char *sector_word = next_word(&arguments), *disk_word = next_word(&arguments);
    struct virtio_device *disk;
    uint64_t sector;

    if (!ends("read", arguments) || !(disk = find_disk("read", disk_word)) ||
        !is_sector("read", sector_word, &sector) || !is_on_disk("read", disk, sector) ||
        !succeeded("read", block_request(disk, VIRTIO_BLK_T_IN, sector)))
        return false;
    dump(block_data(disk));
    return true;
}

static bool write(char *arguments)
{
    char *sector_word = next_word(&arguments);
    struct virtio_device *disk = find_disk("write", NULL);
    uint32_t length = strlen(arguments);
    uint64_t sector;

    if (!disk || !is_sector("write", sector_word, &sector) || !is_on_disk("write", disk, sector))
        return false;
    if (length > SECTOR_SIZE) {
        print("write: the text is longer than a sector\n");
        return false;
    }
    if (virtio_has(disk, VIRTIO_BLK_F_RO)) {
        print("write: the disk is read-only\n");
        return false;
    }
    memcpy(block_data(disk), arguments, length);
    memset(block_data(disk) + length, 0, SECTOR_SIZE - length);
    if (!succeeded("write", block_request(disk, VIRTIO_BLK_T_OUT, sector)))
        return false;
    print("wrote sector %l\n", sector);
    return true;
}

static bool flush(char *arguments)
{
    char *disk_word = next_word(&arguments);
    struct virtio_device *disk;

    if (!ends("flush", arguments) || !(disk = find_disk("flush", disk_word)))
        return false;
    /* A disk that does not offer it writes through (5.2.6.2). */
    if (virtio_has(disk, VIRTIO_BLK_F_FLUSH) &&
        !succeeded("flush", block_request(disk, VIRTIO_BLK_T_FLUSH, 0)))
        return false;
    print("flushed\n");
    return true;
}

static bool rand(char *arguments)
{
    char *word = next_word(&arguments);
    struct virtio_device *rng = virtio_find(&rng_driver, 0);
    uint64_t count;

    if (!word) {
        print("rand: how many bytes?\n");
        return false;
    }
    if (!is_number(word, 1, RNG_MAX, &count)) {
        print("rand: '%s' is not a number from 1 to %u\n", word, RNG_MAX);
        return false;
    }
    if (!ends("rand", arguments))
        return false;
    if (!rng) {
        print("rand: no entropy device\n");
        return false;
    }
    /* The device may give fewer than asked for (5.4.6.2). */
    for (uint32_t done = 0, length; done < count;) {
        const uint8_t *bytes;

        length = count - done;
        bytes = rng_read(rng, &length);
        if (!bytes) {
            print("rand: the entropy device was reset meanwhile\n");
            return false;
        }
        for (; length && done < count; length--, bytes++) {
            done++;
            print(done % 32 && done < count ? "%2x" : "%2x\n", *bytes);
        }
    }
    return true;
}

static void print_features(const struct virtio_device *device, const struct feature *feature)
{
    for (; feature->name; feature++)
        if (virtio_has(device, feature->bit))
            print(" %s", feature->name);
}

static bool stat(char *arguments)
{
    if (!ends("stat", arguments))
        return false;
    for (const struct virtio_device *device = devices; device < devices + device_count; device++) {
        const struct driver *driver = device->driver;

        print("%s%u: ", driver->name, device->number);
        if (!device->running)
            print("not running; ");
        print("features");
        print_features(device, driver->features);
        print_features(device, ring_features);
        print("; %u interrupts", device->interrupts);
        for (uint32_t i = 0; i < driver->queue_count; i++)
            print("; %s: %u requests, %u kicks", driver->queues[i].name, device->queues[i].requests,
                  device->queues[i].kicks);
        print("\n");
    }
    return true;
}

/* Reset each device but the console with requests in its queues. */
static bool reset_all(void)
{
    struct virtio_device *device, *end = devices + device_count;
    bool all = true;

    for (device = devices; device < end; device++)
        if (device->running && device->driver->submit)
            device->driver->submit(device);
    for (device = devices; device < end; device++) {
        if (device->driver == &console_driver || virtio_start(device))
            continue;
        print("reset: %s%u does not come back\n", device->driver->name, device->number);
        all = false;
    }
    return all;
}

static bool reset(char *arguments)
{
    char *word = next_word(&arguments);
    uint64_t count = 1;

    if (word && !is_number(word, 1, UINT32_MAX, &count)) {
        print("reset: '%s' is not a count\n", word);
        return false;
    }
    if (!ends("reset", arguments))
        return false;
    for (uint32_t done = 0; done < count; done++)
        if (!reset_all())
            return false;
    print("%l resets, ok\n", count);
    return true;
}

static bool off(char *arguments)
{
    if (!ends("off", arguments))
        return false;
    console_drain();
    power_off(any_failed);
}

static bool start_over(char *arguments)
{
    if (!ends("reboot", arguments))
        return false;
    console_drain();
    reboot();
}

const struct command commands[] = {
    {"help", "", "show this", help},
    {"ping", "[ADDRESS [COUNT]]", "send echo requests, to the gateway unless told", ping},
    {"read", "SECTOR [DISK]", "show a sector", read},
    {"write", "SECTOR TEXT", "fill a sector of disk 0", write},
    {"flush", "[DISK]", "wait until what was written is on stable storage", flush},
    {"rand", "N", "show N random bytes", rand},
    {"stat", "", "show the devices and their counters", stat},
    {"reset", "[N]", "reset every device but the console, N times, under load", reset},
    {"off", "", "switch off", off},
    {"reboot", "", "start over", start_over},
    {NULL, NULL, NULL, NULL},
};
