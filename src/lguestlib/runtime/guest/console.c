#include "console.h"

#include "guest.h"
#include "text.h"
#include "virtio.h"

#define RECEIVE 0
#define TRANSMIT 1
#define BUFFER_SIZE 256

#define VIRTIO_CONSOLE_F_SIZE 0

/* The buffer being read, and the one being filled: its place, and what is in it. */
static char *input, *output;
static uint32_t input_position, input_length, output_length;

static void configure(struct virtio_device *device)
{
    if (virtio_has(device, VIRTIO_CONSOLE_F_SIZE))
        virtio_config(device, 0, &device->size, 2, 2);
}

static void started(struct virtio_device *device)
{
    if (!device->number)
        input = output = NULL;
}

char console_get(void)
{
    while (!input || input_position == input_length) {
        struct virtio_device *console = virtio_find(&console_driver, 0);
        struct virtqueue *queue;

        if (!console) {
            idle();
            continue;
        }
        queue = &console->queues[RECEIVE];
        if (input) {
            queue_give_back(queue, input);
            queue_kick(queue);
            input = NULL;
        }
        if (queue_wait(queue)) {
            input = queue_take(queue, &input_length);
            input_position = 0;
        }
    }
    return input[input_position++];
}

void console_put(char character)
{
    while (!output) {
        struct virtio_device *console = virtio_find(&console_driver, 0);

        if (!console)
            return;
        output = queue_buffer(&console->queues[TRANSMIT]);
        output_length = 0;
        if (!output)
            queue_wait(&console->queues[TRANSMIT]);
    }
    output[output_length++] = character;
    if (output_length == BUFFER_SIZE)
        console_flush();
}

void console_flush(void)
{
    struct virtio_device *console;

    if (output && (console = virtio_find(&console_driver, 0)))
        queue_send(&console->queues[TRANSMIT], output_length);
    output = NULL;
}

void console_drain(void)
{
    struct virtio_device *console = virtio_find(&console_driver, 0);

    if (!console)
        return;
    console_flush();
    while (console->queues[TRANSMIT].free_count < console->queues[TRANSMIT].size &&
           queue_wait(&console->queues[TRANSMIT]))
        queue_buffer(&console->queues[TRANSMIT]);
}

void print(const char *text, ...)
{
    va_list arguments;

    va_start(arguments, text);
    format(console_put, text, arguments);
    va_end(arguments);
}

const struct driver console_driver = {
    .type = VIRTIO_ID_CONSOLE,
    .name = "console",
    .features = (const struct feature[]){{VIRTIO_CONSOLE_F_SIZE, "SIZE"}, {0, NULL}},
    .queue_count = 2,
    .queues = {{"receive", 64, BUFFER_SIZE, true}, {"transmit", 64, BUFFER_SIZE, false}},
    .configure = configure,
    .started = started,
};
