/* virtio, the driver's side: devices (virtio 1.3, 3) and split virtqueues (2.7), behind any transport. */

#ifndef VIRTIO_H
#define VIRTIO_H

#include <stdbool.h>
#include <stdint.h>

#include "transport.h"

#define VIRTIO_ID_NET 1
#define VIRTIO_ID_BLOCK 2
#define VIRTIO_ID_CONSOLE 3
#define VIRTIO_ID_RNG 4

/* A feature worth having: its bit and its name. */
struct feature {
    uint8_t bit;
    const char *name;
};

#define VIRTIO_F_EVENT_IDX 29
#define VIRTIO_F_VERSION_1 32
#define VIRTIO_F_IN_ORDER 35
#define VIRTIO_F_NOTIFICATION_DATA 38

/* Written by the driver alone. */
struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

#define DESC_F_NEXT 1
#define DESC_F_WRITE 2

/* Written by the driver alone.  used_event follows the ring. */
struct available_ring {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[];
};

#define AVAIL_F_NO_INTERRUPT 1

/* Written by the device alone.  avail_event follows the ring. */
struct used_ring {
    uint16_t flags;
    uint16_t index;
    struct {
        uint32_t id;
        uint32_t length;
    } ring[];
};

#define USED_F_NO_NOTIFY 1

struct virtqueue {
    struct virtio_device *device;
    uint16_t number;
    uint16_t size;
    struct descriptor *descriptors;
    volatile struct available_ring *available;
    volatile struct used_ring *used;

    /* The free descriptors, chained by their next. */
    uint16_t free, free_count;

    /* Free-running indices: of the next chain to offer, at the last kick, of the next one to take back. */
    uint16_t next_available, announced, next_used;

    /* With IN_ORDER: what the device said of a batch whose last chain has not been taken back. */
    bool in_batch;
    uint32_t batch_last, batch_length;

    /* A buffer for each descriptor. */
    uint8_t *pool;

    /* Over PCI: where the device is notified of it. */
    uintptr_t doorbell;

    /* Since boot: chains offered, notifications sent. */
    uint32_t requests, kicks;
};

/* What a driver says of one of its queues. */
struct queue_kind {
    const char *name;
    /* Descriptors, a power of two, and the bytes of the buffer of each. */
    uint16_t size, buffer_size;
    /* Whether its buffers are for the device to fill, from the start. */
    bool receive;
};

#define QUEUES_MAX 2

/* The longest chain, of a block request, and then a power of two. */
#define QUEUE_SIZE_MIN 4

struct virtio_device {
    const struct transport *transport;
    /* The transport's registers, and the config space. */
    uintptr_t registers, config;
    /* Over MMIO: the interrupt line.  Over PCI: where queues are notified, and how far apart. */
    uint32_t line;
    uintptr_t notify;
    uint32_t notify_multiplier;
    const struct driver *driver;
    /* Among the devices of its kind. */
    uint32_t number;
    /* Negotiated, a bit for each. */
    uint32_t features[2];
    struct virtqueue queues[QUEUES_MAX];

    bool running;
    /* How often it was started, and how often it failed since it last did something. */
    uint32_t starts, failures;
    volatile uint32_t interrupts;
    volatile bool config_changed;

    /* From the config space, each to its kind. */
    union {
        uint64_t capacity;
        uint8_t mac[6];
        struct {
            uint16_t columns, rows;
        } size;
    };
};

struct driver {
    uint32_t type;
    const char *name;
    /* Ended by one without a name. */
    const struct feature *features;
    uint32_t queue_count;
    struct queue_kind queues[QUEUES_MAX];

    /* Read the config space: before the device goes live, and when it has changed. */
    void (*configure)(struct virtio_device *device);
    /* It is live, its rings are new: nothing of before is in flight any more. */
    void (*started)(struct virtio_device *device);
    /* Look at the queues whose work comes from outside. */
    void (*serve)(struct virtio_device *device);
    /* Put a request in flight and do not wait for it. */
    void (*submit)(struct virtio_device *device);
};

extern const struct driver console_driver, net_driver, block_driver, rng_driver;
extern const struct feature ring_features[];

#define DEVICES_MAX 64
extern struct virtio_device devices[DEVICES_MAX];
extern uint32_t device_count;

/* Put a device of that type on the list if we have its driver; NULL if not.  There has to be room. */
struct virtio_device *virtio_add(uint32_t type, const struct transport *transport);

/* The device of that kind and number, if it works. */
struct virtio_device *virtio_find(const struct driver *driver, uint64_t number);

/* Reset it and bring it up from the beginning; whether it runs. */
bool virtio_start(struct virtio_device *device);

bool virtio_has(const struct virtio_device *device, uint32_t feature);

/* Read count fields of width bytes from the config space, all of one generation. */
void virtio_config(struct virtio_device *device, uint32_t offset, void *to, uint32_t width, uint32_t count);

/* What an interrupt has left to do. */
void virtio_serve(void);

/* One buffer of a chain. */
struct buffer {
    void *data;
    uint32_t length;
    bool writable;
};

/* Make a chain available; there have to be count free descriptors. */
void queue_add(struct virtqueue *queue, const struct buffer *buffers, uint32_t count);

/* What the device is notified with: where the next chain will be, too, if it wants to know (2.9). */
uint32_t queue_notification(const struct virtqueue *queue);

/* Notify the device of what was added, if it wants to know. */
void queue_kick(struct virtqueue *queue);

/* Take a used chain back: its first buffer, and the bytes written; NULL if there is none. */
void *queue_take(struct virtqueue *queue, uint32_t *written);

/* Whether there is a used chain; if not, the next one will interrupt. */
bool queue_ready(struct virtqueue *queue);

/* Sleep until there is a used chain; false if the device was reset instead. */
bool queue_wait(struct virtqueue *queue);

/*
 * For transmit queues, which interrupt only when waited for.  queue_buffer() takes back what is used
 * and gives the buffer of a free descriptor, or NULL; queue_send() offers it, before any other call.
 */
void *queue_buffer(struct virtqueue *queue);
void queue_send(struct virtqueue *queue, uint32_t length);

/* Offer a receive buffer that queue_take() gave. */
void queue_give_back(struct virtqueue *queue, void *data);

#endif
