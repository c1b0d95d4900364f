/* The disk (virtio 1.3, 5.2): one request at a time, one sector at most. */

#ifndef BLOCK_H
#define BLOCK_H

#include <stdint.h>

#include "virtio.h"

#define SECTOR_SIZE 512

#define VIRTIO_BLK_F_RO 5
#define VIRTIO_BLK_F_FLUSH 9

#define VIRTIO_BLK_T_IN 0
#define VIRTIO_BLK_T_OUT 1
#define VIRTIO_BLK_T_FLUSH 4

#define VIRTIO_BLK_S_OK 0
#define VIRTIO_BLK_S_IOERR 1
#define VIRTIO_BLK_S_UNSUPP 2
/* Our own: the device was reset with the request in flight. */
#define BLOCK_LOST 255

/* Where a sector's data is put before a write, and found after a read. */
uint8_t *block_data(struct virtio_device *disk);

/* Do a request and return its status. */
uint8_t block_request(struct virtio_device *disk, uint32_t type, uint64_t sector);

#endif
