/* virtio over MMIO (virtio 1.3, 4.2): one interrupt line for all a device has to say. */

#include "machine.h"
#include "transport.h"
#include "virtio.h"
#include "x86.h"

/* The registers (4.2.2). */
#define MAGIC_VALUE 0x000
#define VERSION 0x004
#define DEVICE_ID 0x008
#define DEVICE_FEATURES 0x010
#define DEVICE_FEATURES_SELECT 0x014
#define DRIVER_FEATURES 0x020
#define DRIVER_FEATURES_SELECT 0x024
#define QUEUE_SELECT 0x030
#define QUEUE_SIZE_LARGEST 0x034
#define QUEUE_SIZE 0x038
#define QUEUE_READY 0x044
#define QUEUE_NOTIFY 0x050
#define INTERRUPT_STATUS 0x060
#define INTERRUPT_ACK 0x064
#define STATUS 0x070
#define QUEUE_DESCRIPTORS 0x080
#define QUEUE_DRIVER 0x090
#define QUEUE_DEVICE 0x0a0
#define CONFIG_GENERATION 0x0fc
#define CONFIG 0x100

#define MAGIC 0x74726976
#define INTERRUPT_CONFIG 2

static uint32_t status(struct virtio_device *device)
{
    return read32(device->registers + STATUS);
}

static void set_status(struct virtio_device *device, uint32_t value)
{
    write32(device->registers + STATUS, value);
}

static uint32_t offered(struct virtio_device *device, uint32_t page)
{
    write32(device->registers + DEVICE_FEATURES_SELECT, page);
    return read32(device->registers + DEVICE_FEATURES);
}

static void accept(struct virtio_device *device, uint32_t page, uint32_t features)
{
    write32(device->registers + DRIVER_FEATURES_SELECT, page);
    write32(device->registers + DRIVER_FEATURES, features);
}

static uint32_t queue_size(struct virtio_device *device, uint32_t number)
{
    write32(device->registers + QUEUE_SELECT, number);
    return read32(device->registers + QUEUE_READY) ? 0 : read32(device->registers + QUEUE_SIZE_LARGEST);
}

static void write_address(uintptr_t reg, const volatile void *address)
{
    write32(reg, (uintptr_t)address);
    write32(reg + 4, 0);
}

/* The steps of 4.2.3.2; the queue is selected. */
static void enable(struct virtqueue *queue)
{
    uintptr_t base = queue->device->registers;

    write32(base + QUEUE_SIZE, queue->size);
    write_address(base + QUEUE_DESCRIPTORS, queue->descriptors);
    write_address(base + QUEUE_DRIVER, queue->available);
    write_address(base + QUEUE_DEVICE, queue->used);
    write32(base + QUEUE_READY, 1);
}

static void notify(struct virtqueue *queue)
{
    write32(queue->device->registers + QUEUE_NOTIFY, queue_notification(queue));
}

static uint32_t generation(struct virtio_device *device)
{
    return read32(device->registers + CONFIG_GENERATION);
}

static const struct transport mmio = {
    status, set_status, offered, accept, queue_size, enable, notify, generation,
};

void mmio_add(uint64_t registers, uint64_t line)
{
    uintptr_t base = registers;
    struct virtio_device *device;

    if (device_count == DEVICES_MAX || registers >> 32 || line > 23 || read32(base + MAGIC_VALUE) != MAGIC ||
        read32(base + VERSION) != 2) {
        last_words("nothing to be used at 0x%8x", (uint32_t)base);
        return;
    }
    device = virtio_add(read32(base + DEVICE_ID), &mmio);
    if (!device)
        return;
    device->registers = base;
    device->config = base + CONFIG;
    device->line = line;
    interrupt_enable(line);
}

void mmio_interrupt(uint32_t line)
{
    for (struct virtio_device *device = devices; device < devices + device_count; device++) {
        uint32_t reasons;

        if (device->transport != &mmio || device->line != line)
            continue;
        reasons = read32(device->registers + INTERRUPT_STATUS);
        if (!reasons)
            continue;
        write32(device->registers + INTERRUPT_ACK, reasons);
        device->interrupts++;
        if (reasons & INTERRUPT_CONFIG)
            device->config_changed = true;
    }
}
