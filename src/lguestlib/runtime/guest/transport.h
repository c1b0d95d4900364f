/* How a driver gets at a device's registers: what virtio over MMIO and virtio over PCI have in common. */

#ifndef TRANSPORT_H
#define TRANSPORT_H

#include <stdbool.h>
#include <stdint.h>

struct virtio_device;
struct virtqueue;

struct transport {
    /* The device status (2.1). */
    uint32_t (*status)(struct virtio_device *device);
    void (*set_status)(struct virtio_device *device, uint32_t status);

    /* 32 feature bits from 32 * page on: what is offered, and what is accepted (2.2). */
    uint32_t (*offered)(struct virtio_device *device, uint32_t page);
    void (*accept)(struct virtio_device *device, uint32_t page, uint32_t features);

    /* The largest size of a queue that is not enabled, and 0 for another. */
    uint32_t (*queue_size)(struct virtio_device *device, uint32_t number);
    /* Tell of the queue, and enable it; its interrupts are on from here. */
    void (*enable)(struct virtqueue *queue);
    void (*notify)(struct virtqueue *queue);

    uint32_t (*generation)(struct virtio_device *device);
};

/* Put the device whose registers are there on the list, if it is one and we have its driver (4.2). */
void mmio_add(uint64_t registers, uint64_t line);

/* The interrupt handler's part for a line: say what for, and acknowledge. */
void mmio_interrupt(uint32_t line);

/* Put the devices on the PCI bus on the list, in the order of their slots (4.1). */
void pci_scan(void);

/* The interrupt handler's part for a message, counted from 0. */
void pci_interrupt(uint32_t message);

#endif
