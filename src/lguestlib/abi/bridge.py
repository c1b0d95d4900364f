"""Ethernet bridges, linux/sockios.h.

SIOCBRADDBR and SIOCBRDELBR take the bridge's name, the other two an `ifreq`
with the bridge's name and the interface's index.
"""

SIOCBRADDBR = 0x89A0
SIOCBRDELBR = 0x89A1
SIOCBRADDIF = 0x89A2
SIOCBRDELIF = 0x89A3
