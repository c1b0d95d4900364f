/* What every part of the guest may do while it waits. */

#ifndef GUEST_H
#define GUEST_H

/* Show what was printed, sleep until an interrupt, and do what it asks: answer the network, for one. */
void idle(void);

#endif
