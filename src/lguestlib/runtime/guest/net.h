/* The network (virtio 1.3, 5.1): enough of Ethernet, ARP, IPv4 and ICMP to ping and be pinged. */

#ifndef NET_H
#define NET_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio.h"

/* Ours, the router's and the mask, in network order; 0 for none.  They are net 0's. */
extern uint32_t net_address, net_gateway, net_mask;

/* Where packets for the address go first: itself, or the gateway. */
uint32_t net_next_hop(uint32_t address);

/* Ask who has the address, unless it is known: three times, a second each. */
bool net_resolve(uint32_t address);

/* Forget who has it. */
void net_forget(uint32_t address);

struct echo {
    /* Bytes of the frame that answered, and nanoseconds it took. */
    uint32_t length, nanoseconds;
};

/* An ICMP echo request by way of a resolved next hop; false if nothing came back within a second. */
bool net_ping(uint32_t address, uint32_t next_hop, struct echo *echo);

#endif
