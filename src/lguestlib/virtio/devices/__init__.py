"""The devices: console, net, block, entropy.  The smallest, entropy, is the best first read."""
