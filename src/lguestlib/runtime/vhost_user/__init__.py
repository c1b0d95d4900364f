"""vhost-user over its socket: a server with devices behind it, and a front-end for anybody's back-end."""
