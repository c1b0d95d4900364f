#include "rng.h"

#include "text.h"

#define REQUESTS 0

static void send(struct virtio_device *rng, uint32_t length)
{
    struct buffer buffer = {rng->queues[REQUESTS].pool, length, true};

    queue_add(&rng->queues[REQUESTS], &buffer, 1);
    queue_kick(&rng->queues[REQUESTS]);
}

uint8_t *rng_read(struct virtio_device *rng, uint32_t *length)
{
    send(rng, *length);
    if (!queue_wait(&rng->queues[REQUESTS]))
        return NULL;
    return queue_take(&rng->queues[REQUESTS], length);
}

static void submit(struct virtio_device *rng)
{
    send(rng, RNG_MAX);
}

const struct driver rng_driver = {
    .type = VIRTIO_ID_RNG,
    .name = "rng",
    .features = (const struct feature[]){{0, NULL}},
    .queue_count = 1,
    .queues = {{"requests", 4, RNG_MAX, false}},
    .submit = submit,
};
