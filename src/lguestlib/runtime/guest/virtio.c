#include "virtio.h"

#include "guest.h"
#include "machine.h"
#include "text.h"
#include "x86.h"

/* The device status (2.1). */
#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define NEEDS_RESET 64
#define FAILED 128

/* A device that fails more often than this without doing anything is left alone. */
#define FAILURES_MAX 3

const struct feature ring_features[] = {
    {VIRTIO_F_EVENT_IDX, "EVENT_IDX"},
    {VIRTIO_F_VERSION_1, "VERSION_1"},
    {VIRTIO_F_IN_ORDER, "IN_ORDER"},
    {VIRTIO_F_NOTIFICATION_DATA, "NOTIFICATION_DATA"},
    {0, NULL},
};

static const struct driver *const drivers[] = {&console_driver, &net_driver, &block_driver, &rng_driver};

struct virtio_device devices[DEVICES_MAX];
uint32_t device_count;

struct virtio_device *virtio_add(uint32_t type, const struct transport *transport)
{
    struct virtio_device *device = &devices[device_count];
    uint32_t number = 0;

    for (unsigned i = 0; i < sizeof drivers / sizeof *drivers; i++)
        if (drivers[i]->type == type)
            device->driver = drivers[i];
    if (!device->driver)
        return NULL;
    for (unsigned i = 0; i < device_count; i++)
        number += devices[i].driver == device->driver;
    device->transport = transport;
    device->number = number;
    device_count++;
    return device;
}

struct virtio_device *virtio_find(const struct driver *driver, uint64_t number)
{
    for (struct virtio_device *device = devices; device < devices + device_count; device++)
        if (device->driver == driver && device->number == number)
            return device->running ? device : NULL;
    return NULL;
}

bool virtio_has(const struct virtio_device *device, uint32_t feature)
{
    return device->features[feature / 32] >> feature % 32 & 1;
}

/* Accept what is offered and wanted.  Nothing here can do without VERSION_1 (6.1). */
static bool negotiate(struct virtio_device *device)
{
    const struct transport *transport = device->transport;
    uint32_t wanted[2] = {0, 0};

    for (const struct feature *feature = ring_features; feature->name; feature++)
        wanted[feature->bit / 32] |= 1u << feature->bit % 32;
    for (const struct feature *feature = device->driver->features; feature->name; feature++)
        wanted[feature->bit / 32] |= 1u << feature->bit % 32;
    for (unsigned page = 0; page < 2; page++) {
        device->features[page] = transport->offered(device, page) & wanted[page];
        transport->accept(device, page, device->features[page]);
    }
    return virtio_has(device, VIRTIO_F_VERSION_1);
}

/* The event fields stand behind the other side's ring (2.7.6, 2.7.8). */
static volatile uint16_t *used_event(struct virtqueue *queue)
{
    return &queue->available->ring[queue->size];
}

static volatile uint16_t *avail_event(struct virtqueue *queue)
{
    return (volatile uint16_t *)&queue->used->ring[queue->size];
}

/* Give the device a queue with nothing in it. */
static bool set_up_queue(struct virtio_device *device, uint32_t number)
{
    const struct queue_kind *kind = &device->driver->queues[number];
    struct virtqueue *queue = &device->queues[number];
    uint32_t size = kind->size, largest = device->transport->queue_size(device, number);

    if (largest < QUEUE_SIZE_MIN)
        return false;
    while (size > largest)
        size /= 2;
    if (!queue->pool) {
        queue->device = device;
        queue->number = number;
        queue->size = size;
        queue->descriptors = allocate(size * sizeof *queue->descriptors);
        queue->available = allocate(sizeof *queue->available + size * 2 + 2);
        queue->used = allocate(sizeof *queue->used + size * 8 + 2);
        queue->pool = allocate(size * kind->buffer_size);
    } else if (size != queue->size) {
        return false;
    }
    for (uint16_t i = 0; i < queue->size; i++)
        queue->descriptors[i].next = i + 1 < queue->size ? i + 1 : 0;
    queue->free = 0;
    queue->in_batch = false;
    queue->free_count = queue->size;
    queue->next_available = queue->announced = queue->next_used = 0;
    queue->available->flags = queue->available->index = 0;
    queue->used->flags = queue->used->index = 0;
    *used_event(queue) = *avail_event(queue) = 0;
    device->transport->enable(queue);
    return true;
}

static bool set_up_queues(struct virtio_device *device)
{
    for (uint32_t number = 0; number < device->driver->queue_count; number++) {
        const struct queue_kind *kind = &device->driver->queues[number];
        struct virtqueue *queue = &device->queues[number];

        if (!set_up_queue(device, number))
            return false;
        for (uint32_t i = 0; kind->receive && i < queue->size; i++)
            queue_give_back(queue, queue->pool + i * kind->buffer_size);
    }
    return true;
}

/* The steps of 3.1.1, in its order. */
bool virtio_start(struct virtio_device *device)
{
    const struct transport *transport = device->transport;

    device->running = false;
    device->config_changed = false;
    device->starts++;
    transport->set_status(device, 0);
    while (transport->status(device))
        ;
    transport->set_status(device, ACKNOWLEDGE);
    transport->set_status(device, ACKNOWLEDGE | DRIVER);
    if (!negotiate(device))
        goto failed;
    transport->set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(transport->status(device) & FEATURES_OK))
        goto failed;
    if (!set_up_queues(device))
        goto failed;
    if (device->driver->configure)
        device->driver->configure(device);
    transport->set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    device->running = true;
    if (device->driver->started)
        device->driver->started(device);
    for (uint32_t number = 0; number < device->driver->queue_count; number++)
        queue_kick(&device->queues[number]);
    return true;

failed:
    transport->set_status(device, FAILED);
    last_words("%s%u: cannot be set up", device->driver->name, device->number);
    return false;
}

void virtio_config(struct virtio_device *device, uint32_t offset, void *to, uint32_t width, uint32_t count)
{
    uint32_t generation;
    uintptr_t field;

    do {
        generation = device->transport->generation(device);
        field = device->config + offset;
        for (uint32_t i = 0; i < count; i++, field += width) {
            if (width == 4)
                ((uint32_t *)to)[i] = read32(field);
            else if (width == 2)
                ((uint16_t *)to)[i] = read16(field);
            else
                ((uint8_t *)to)[i] = read8(field);
        }
    } while (device->transport->generation(device) != generation);
}

/* The config space has changed, or the device has failed and says so in its status (2.1.2). */
static void look_again(struct virtio_device *device)
{
    const struct driver *driver = device->driver;

    device->config_changed = false;
    if (!(device->transport->status(device) & NEEDS_RESET)) {
        if (driver->configure)
            driver->configure(device);
    } else if (device->failures++ < FAILURES_MAX) {
        last_words("%s%u: needs a reset, and gets it", driver->name, device->number);
        virtio_start(device);
    } else {
        last_words("%s%u: needs a reset again and again, and is given up", driver->name, device->number);
        device->transport->set_status(device, FAILED);
        device->running = false;
    }
}

void virtio_serve(void)
{
    for (struct virtio_device *device = devices; device < devices + device_count; device++) {
        if (!device->running)
            continue;
        if (device->config_changed)
            look_again(device);
        if (device->driver->serve && device->running)
            device->driver->serve(device);
    }
}

/* Supplying buffers to the device, 2.7.13.  The chain keeps the links of the free list. */
void queue_add(struct virtqueue *queue, const struct buffer *buffers, uint32_t count)
{
    uint16_t head = queue->free;

    for (uint32_t left = count; left; left--, buffers++) {
        struct descriptor *descriptor = &queue->descriptors[queue->free];

        descriptor->address = (uintptr_t)buffers->data;
        descriptor->length = buffers->length;
        descriptor->flags = (buffers->writable ? DESC_F_WRITE : 0) | (left > 1 ? DESC_F_NEXT : 0);
        queue->free = descriptor->next;
    }
    queue->free_count -= count;
    queue->requests++;
    queue->available->ring[queue->next_available & (queue->size - 1)] = head;
    /* The index may not overtake what it announces. */
    barrier();
    queue->available->index = ++queue->next_available;
}

/* Whether moving the index from old to new is news to the device (2.7.10). */
static bool wants_kick(struct virtqueue *queue, uint16_t old, uint16_t new)
{
    /* The device stores avail_event and then looks at our index: we store the index first and then look. */
    fence();
    if (virtio_has(queue->device, VIRTIO_F_EVENT_IDX))
        return (uint16_t)(new - *avail_event(queue) - 1) < (uint16_t)(new - old);
    return !(queue->used->flags & USED_F_NO_NOTIFY);
}

uint32_t queue_notification(const struct virtqueue *queue)
{
    bool with_data = virtio_has(queue->device, VIRTIO_F_NOTIFICATION_DATA);

    return queue->number | (with_data ? (uint32_t)queue->next_available << 16 : 0);
}

void queue_kick(struct virtqueue *queue)
{
    uint16_t old = queue->announced, new = queue->next_available;

    queue->announced = new;
    if (old != new && wants_kick(queue, old, new)) {
        queue->kicks++;
        queue->device->transport->notify(queue);
    }
}

/*
 * The chain that is next to come back in order, and what was written there: a used element may stand
 * for a batch, of which it names the last; those before it count as written in full (2.7.9).
 */
static uint32_t take_in_order(struct virtqueue *queue, uint32_t named, uint32_t length, uint32_t *written)
{
    uint32_t head = queue->available->ring[queue->next_used & (queue->size - 1)];
    const struct descriptor *part = &queue->descriptors[head];

    if (!queue->in_batch) {
        queue->batch_last = named;
        queue->batch_length = length;
    }
    queue->in_batch = head != queue->batch_last;
    *written = queue->batch_length;
    if (queue->in_batch) {
        *written = part->flags & DESC_F_WRITE ? part->length : 0;
        while (part->flags & DESC_F_NEXT) {
            part = &queue->descriptors[part->next];
            *written += part->flags & DESC_F_WRITE ? part->length : 0;
        }
    }
    return head;
}

/* Receiving used buffers from the device, 2.7.14. */
void *queue_take(struct virtqueue *queue, uint32_t *written)
{
    uint32_t slot = queue->next_used & (queue->size - 1), head, last;
    bool in_order = virtio_has(queue->device, VIRTIO_F_IN_ORDER);

    if (queue->used->index == queue->next_used)
        return NULL;
    barrier();
    head = queue->used->ring[slot].id;
    *written = queue->used->ring[slot].length;
    if (in_order)
        head = take_in_order(queue, head, *written, written);
    if (head >= queue->size)
        die("a device returned a buffer it was not given");
    queue->next_used++;
    queue->device->failures = 0;
    last = head;
    for (queue->free_count++; queue->descriptors[last].flags & DESC_F_NEXT; queue->free_count++)
        last = queue->descriptors[last].next;
    if (!in_order) {
        queue->descriptors[last].next = queue->free;
        queue->free = head;
    } /* Or the free ones follow each other round the table, which is the order to use them in (2.7.5.2). */
    return (void *)(uintptr_t)queue->descriptors[head].address;
}

bool queue_ready(struct virtqueue *queue)
{
    if (queue->used->index != queue->next_used)
        return true;
    if (virtio_has(queue->device, VIRTIO_F_EVENT_IDX))
        *used_event(queue) = queue->next_used;
    else
        queue->available->flags = 0;
    /* The device stores its index and then looks at used_event: we store used_event first and then look. */
    fence();
    return queue->used->index != queue->next_used;
}

bool queue_wait(struct virtqueue *queue)
{
    struct virtio_device *device = queue->device;
    uint32_t starts = device->starts;

    while (!queue_ready(queue)) {
        idle();
        if (!device->running || device->starts != starts)
            return false;
    }
    return true;
}

static void suppress_interrupts(struct virtqueue *queue)
{
    /* An event half the index's range ahead is not met before it is moved on. */
    if (virtio_has(queue->device, VIRTIO_F_EVENT_IDX))
        *used_event(queue) = queue->next_used + 0x8000;
    else
        queue->available->flags = AVAIL_F_NO_INTERRUPT;
}

static uint32_t buffer_size(const struct virtqueue *queue)
{
    return queue->device->driver->queues[queue->number].buffer_size;
}

void *queue_buffer(struct virtqueue *queue)
{
    uint32_t written;

    while (queue_take(queue, &written))
        ;
    suppress_interrupts(queue);
    return queue->free_count ? queue->pool + queue->free * buffer_size(queue) : NULL;
}

void queue_send(struct virtqueue *queue, uint32_t length)
{
    struct buffer buffer = {queue->pool + queue->free * buffer_size(queue), length, false};

    queue_add(queue, &buffer, 1);
    queue_kick(queue);
}

void queue_give_back(struct virtqueue *queue, void *data)
{
    struct buffer buffer = {data, buffer_size(queue), true};

    queue_add(queue, &buffer, 1);
}
