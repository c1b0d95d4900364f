/* virtio over PCI (virtio 1.3, 4.1): a message for each queue, and one that all config spaces share. */

#include <stddef.h>

#include "machine.h"
#include "transport.h"
#include "virtio.h"
#include "x86.h"

/* The host bridge's ports (PCI Local Bus 3.0, 3.2.2.3.2). */
#define PORT_ADDRESS 0xcf8
#define PORT_DATA 0xcfc
#define ADDRESS_ENABLE 0x80000000u
#define SLOTS 32

/* Configuration space (PCI Local Bus 3.0, 6). */
#define ID 0x00
#define COMMAND 0x04
#define BAR(number) (0x10 + 4 * (number))
#define CAPABILITIES 0x34
#define COMMAND_MEMORY_MASTER_NO_PIN 0x0406
#define BAR_64_BIT 0x4
#define CAPABILITY_VENDOR 0x09
#define CAPABILITY_MSIX 0x11
#define MSIX_ENABLE (1u << 31)

#define VENDOR 0x1af4
#define DEVICE_BASE 0x1040

/* virtio's capabilities by kind (4.1.4). */
#define KIND_COMMON 1
#define KIND_NOTIFY 2
#define KIND_CONFIG 4

/* The common configuration (4.1.4.3). */
#define DEVICE_FEATURE_SELECT 0x00
#define DEVICE_FEATURE 0x04
#define DRIVER_FEATURE_SELECT 0x08
#define DRIVER_FEATURE 0x0c
#define CONFIG_VECTOR 0x10
#define STATUS 0x14
#define CONFIG_GENERATION 0x15
#define QUEUE_SELECT 0x16
#define QUEUE_SIZE 0x18
#define QUEUE_VECTOR 0x1a
#define QUEUE_ENABLE 0x1c
#define QUEUE_NOTIFY_OFFSET 0x1e
#define QUEUE_DESCRIPTORS 0x20
#define QUEUE_DRIVER 0x28
#define QUEUE_DEVICE 0x30

/* The message that every config space shares; those behind it are queues'. */
#define MESSAGE_CONFIG 0

/* Whose a message is. */
static struct virtio_device *owners[MESSAGES];
static uint32_t message_count = MESSAGE_CONFIG + 1;

static uint32_t read_config(uint32_t slot, uint32_t offset)
{
    out32(PORT_ADDRESS, ADDRESS_ENABLE | slot << 11 | offset);
    return in32(PORT_DATA);
}

static void write_config(uint32_t slot, uint32_t offset, uint32_t value)
{
    out32(PORT_ADDRESS, ADDRESS_ENABLE | slot << 11 | offset);
    out32(PORT_DATA, value);
}

static uint32_t status(struct virtio_device *device)
{
    return read8(device->registers + STATUS);
}

static void set_status(struct virtio_device *device, uint32_t value)
{
    write8(device->registers + STATUS, value);
}

static uint32_t offered(struct virtio_device *device, uint32_t page)
{
    write32(device->registers + DEVICE_FEATURE_SELECT, page);
    return read32(device->registers + DEVICE_FEATURE);
}

static void accept(struct virtio_device *device, uint32_t page, uint32_t features)
{
    write32(device->registers + DRIVER_FEATURE_SELECT, page);
    write32(device->registers + DRIVER_FEATURE, features);
}

static uint32_t queue_size(struct virtio_device *device, uint32_t number)
{
    write16(device->registers + QUEUE_SELECT, number);
    return read16(device->registers + QUEUE_ENABLE) ? 0 : read16(device->registers + QUEUE_SIZE);
}

static void write_address(uintptr_t reg, const volatile void *address)
{
    write32(reg, (uintptr_t)address);
    write32(reg + 4, 0);
}

/* The queue is selected.  A reset has taken the vectors, the config space's as well (4.1.5.1.2). */
static void enable(struct virtqueue *queue)
{
    struct virtio_device *device = queue->device;
    uintptr_t base = device->registers;

    write16(base + CONFIG_VECTOR, 0);
    write16(base + QUEUE_VECTOR, 1 + queue->number);
    write16(base + QUEUE_SIZE, queue->size);
    write_address(base + QUEUE_DESCRIPTORS, queue->descriptors);
    write_address(base + QUEUE_DRIVER, queue->available);
    write_address(base + QUEUE_DEVICE, queue->used);
    queue->doorbell = device->notify + read16(base + QUEUE_NOTIFY_OFFSET) * device->notify_multiplier;
    write16(base + QUEUE_ENABLE, 1);
}

static void notify(struct virtqueue *queue)
{
    if (virtio_has(queue->device, VIRTIO_F_NOTIFICATION_DATA))
        write32(queue->doorbell, queue_notification(queue));
    else
        write16(queue->doorbell, queue->number);
}

static uint32_t generation(struct virtio_device *device)
{
    return read8(device->registers + CONFIG_GENERATION);
}

static const struct transport pci = {
    status, set_status, offered, accept, queue_size, enable, notify, generation,
};

/* Where offset is in the BAR of that number, or 0 if that is past what we can reach. */
static uintptr_t in_bar(uint32_t slot, uint32_t number, uint32_t offset)
{
    uint32_t bar = read_config(slot, BAR(number));

    if (bar & BAR_64_BIT && read_config(slot, BAR(number + 1)))
        return 0;
    return (bar & ~0xfu) + offset;
}

/* Vector 0 is the config space's; the queues' follow. */
static void set_message(uintptr_t table, uint32_t vector, uint32_t message)
{
    uintptr_t entry = table + 16 * vector;

    write32(entry, message_address());
    write32(entry + 4, 0);
    write32(entry + 8, message_data(message));
    write32(entry + 12, 0);
}

static void enable_messages(struct virtio_device *device, uint32_t slot, uint32_t capability, uint32_t control)
{
    uint32_t place = read_config(slot, capability + 4);
    uintptr_t table = in_bar(slot, place & 7, place & ~7u);

    set_message(table, 0, MESSAGE_CONFIG);
    for (uint32_t i = 0; i < device->driver->queue_count; i++) {
        uint32_t message = message_count < MESSAGES ? message_count++ : MESSAGES - 1;

        owners[message] = device;
        set_message(table, 1 + i, message);
    }
    write_config(slot, capability, control | MSIX_ENABLE);
}

static void add(uint32_t slot, uint32_t type)
{
    struct virtio_device *device;
    uint32_t msix = 0, control = 0;

    if (device_count == DEVICES_MAX || !(device = virtio_add(type, &pci)))
        return;
    write_config(slot, COMMAND, COMMAND_MEMORY_MASTER_NO_PIN);
    for (uint32_t at = read_config(slot, CAPABILITIES) & 0xff; at; at = read_config(slot, at) >> 8 & 0xff) {
        uint32_t head = read_config(slot, at);
        uintptr_t place;

        if ((head & 0xff) == CAPABILITY_MSIX) {
            msix = at;
            control = head;
        }
        if ((head & 0xff) != CAPABILITY_VENDOR)
            continue;
        place = in_bar(slot, read_config(slot, at + 4) & 0xff, read_config(slot, at + 8));
        switch (head >> 24) {
        case KIND_COMMON:
            device->registers = place;
            break;
        case KIND_NOTIFY:
            device->notify = place;
            device->notify_multiplier = read_config(slot, at + 16);
            break;
        case KIND_CONFIG:
            device->config = place;
            break;
        }
    }
    if (!msix || !device->registers || !device->notify || !device->config) {
        last_words("slot %u: no virtio device that is to be used", slot);
        device->driver = NULL;
        device_count--;
        return;
    }
    enable_messages(device, slot, msix, control);
}

void pci_scan(void)
{
    /* Without a bridge there is nothing at its ports. */
    if (read_config(0, ID) == 0xffffffffu)
        return;
    for (uint32_t slot = 1; slot < SLOTS; slot++) {
        uint32_t id = read_config(slot, ID);

        if ((id & 0xffff) == VENDOR && id >> 16 > DEVICE_BASE)
            add(slot, (id >> 16) - DEVICE_BASE);
    }
}

void pci_interrupt(uint32_t message)
{
    if (message != MESSAGE_CONFIG) {
        if (owners[message])
            owners[message]->interrupts++;
        return;
    }
    for (struct virtio_device *device = devices; device < devices + device_count; device++)
        if (device->transport == &pci)
            device->config_changed = true;
}
