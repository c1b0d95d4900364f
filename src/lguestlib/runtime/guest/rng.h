/* The entropy device (virtio 1.3, 5.4). */

#ifndef RNG_H
#define RNG_H

#include <stdint.h>

#include "virtio.h"

#define RNG_MAX 1024

/*
 * Up to *length random bytes, RNG_MAX at most: where they are, and in *length how many came; NULL if
 * the device was reset.
 */
uint8_t *rng_read(struct virtio_device *rng, uint32_t *length);

#endif
