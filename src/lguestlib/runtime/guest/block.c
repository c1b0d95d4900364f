#include "block.h"

#include "text.h"

#define REQUESTS 0

struct request {
    uint32_t type, reserved;
    uint64_t sector;
    uint8_t data[SECTOR_SIZE];
    uint8_t status;
};

static void configure(struct virtio_device *disk)
{
    virtio_config(disk, 0, &disk->capacity, 4, 2);
}

static struct request *the_request(struct virtio_device *disk)
{
    return (struct request *)disk->queues[REQUESTS].pool;
}

uint8_t *block_data(struct virtio_device *disk)
{
    return the_request(disk)->data;
}

/* Header, data if any, status (5.2.6). */
static void send(struct virtio_device *disk, uint32_t type, uint64_t sector)
{
    struct request *request = the_request(disk);
    struct buffer header = {request, 16, false}, status = {&request->status, 1, true};
    struct buffer data = {request->data, SECTOR_SIZE, type == VIRTIO_BLK_T_IN};

    request->type = type;
    request->reserved = 0;
    request->sector = sector;
    request->status = BLOCK_LOST;
    if (type == VIRTIO_BLK_T_FLUSH)
        queue_add(&disk->queues[REQUESTS], (struct buffer[]){header, status}, 2);
    else
        queue_add(&disk->queues[REQUESTS], (struct buffer[]){header, data, status}, 3);
    queue_kick(&disk->queues[REQUESTS]);
}

uint8_t block_request(struct virtio_device *disk, uint32_t type, uint64_t sector)
{
    uint32_t written;

    send(disk, type, sector);
    if (!queue_wait(&disk->queues[REQUESTS]))
        return BLOCK_LOST;
    queue_take(&disk->queues[REQUESTS], &written);
    return the_request(disk)->status;
}

static void submit(struct virtio_device *disk)
{
    send(disk, VIRTIO_BLK_T_IN, 0);
}

const struct driver block_driver = {
    .type = VIRTIO_ID_BLOCK,
    .name = "block",
    .features =
        (const struct feature[]){{VIRTIO_BLK_F_RO, "RO"}, {VIRTIO_BLK_F_FLUSH, "FLUSH"}, {0, NULL}},
    .queue_count = 1,
    .queues = {{"requests", 4, sizeof(struct request), false}},
    .configure = configure,
    .submit = submit,
};
