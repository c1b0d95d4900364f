#include "net.h"

#include "guest.h"
#include "machine.h"
#include "text.h"

#define RECEIVE 0
#define TRANSMIT 1

#define VIRTIO_NET_F_MAC 5

/* Network order. */
#define BE16(value) __builtin_bswap16(value)

#define TYPE_IPV4 BE16(0x0800)
#define TYPE_ARP BE16(0x0806)
#define ARP_ETHERNET BE16(1)
#define ARP_REQUEST BE16(1)
#define ARP_REPLY BE16(2)
#define IPV4_SHORTEST 0x45
#define IPV4_TTL 64
#define IPV4_FRAGMENT BE16(0x3fff)
#define PROTOCOL_ICMP 1
#define ECHO_REPLY 0
#define ECHO_REQUEST 8

#define ECHO_BYTES 56
#define ECHO_ID BE16(0x6c67)

struct ethernet {
    uint8_t to[6], from[6];
    uint16_t type;
} __attribute__((packed));

struct arp {
    uint16_t hardware, protocol;
    uint8_t hardware_length, protocol_length;
    uint16_t operation;
    uint8_t sender_mac[6];
    uint32_t sender;
    uint8_t target_mac[6];
    uint32_t target;
} __attribute__((packed));

struct ipv4 {
    uint8_t version, service;
    uint16_t length, id, fragment;
    uint8_t ttl, protocol;
    uint16_t checksum;
    uint32_t from, to;
} __attribute__((packed));

struct icmp {
    uint8_t type, code;
    uint16_t checksum, id, sequence;
    uint8_t data[];
} __attribute__((packed));

struct frame {
    struct ethernet ethernet;
    union {
        struct arp arp;
        struct ipv4 ipv4;
    };
} __attribute__((packed));

/* A frame as the device has it, behind a header that asks for nothing (5.1.6). */
struct packet {
    uint8_t header[12];
    struct frame frame;
} __attribute__((packed));

#define FRAME_MAX 1514
#define BUFFER_SIZE 1536

uint32_t net_address, net_gateway, net_mask;

/* Who has what address; 0 is nobody's. */
static struct neighbour {
    uint32_t address;
    uint8_t mac[6];
} neighbours[8];
static uint32_t oldest_neighbour;

/* The echo request waited for, and its answer. */
static uint16_t echo_sequence;
static uint32_t echo_address;
static bool echo_answered;
static struct echo echo_answer;

static const char echo_data[ECHO_BYTES] = "from a guest, through a virtqueue that is a thread";

static const uint8_t nobody[6] = {0}, everybody[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

static struct neighbour *find_neighbour(uint32_t address)
{
    for (unsigned i = 0; i < sizeof neighbours / sizeof *neighbours; i++)
        if (address && neighbours[i].address == address)
            return &neighbours[i];
    return NULL;
}

/* Whom we know is kept up to date; whom we do not is learned only if asked for. */
static void learn(uint32_t address, const uint8_t *mac, bool new)
{
    struct neighbour *neighbour = find_neighbour(address);

    if (!neighbour && new && address) {
        neighbour = &neighbours[oldest_neighbour++ % (sizeof neighbours / sizeof *neighbours)];
        neighbour->address = address;
    }
    if (neighbour)
        memcpy(neighbour->mac, mac, 6);
}

void net_forget(uint32_t address)
{
    struct neighbour *neighbour = find_neighbour(address);

    if (neighbour)
        neighbour->address = 0;
}

/* The Internet checksum (RFC 1071); 0 where the data holds its own and it is right. */
static uint16_t checksum(const void *data, uint32_t length)
{
    const uint8_t *bytes = data;
    uint64_t sum = 0;
    uint32_t folded;

    for (; length >= 4; length -= 4, bytes += 4)
        sum += *(const uint32_t *)bytes;
    if (length >= 2)
        sum += *(const uint16_t *)bytes;
    if (length & 1)
        sum += bytes[length - 1];
    sum = (uint32_t)sum + (sum >> 32);
    folded = (uint32_t)sum + (uint32_t)(sum >> 32);
    folded = (folded & 0xffff) + (folded >> 16);
    folded += folded >> 16;
    return ~folded;
}

/* A frame to fill, or NULL when the device is behind with sending: then it is as good as lost. */
static struct frame *new_frame(struct virtio_device *net, const uint8_t *to, uint16_t type)
{
    struct packet *packet = queue_buffer(&net->queues[TRANSMIT]);

    if (!packet)
        return NULL;
    memset(packet->header, 0, sizeof packet->header);
    memcpy(packet->frame.ethernet.to, to, 6);
    memcpy(packet->frame.ethernet.from, net->mac, 6);
    packet->frame.ethernet.type = type;
    return &packet->frame;
}

static void send(struct virtio_device *net, uint32_t length)
{
    queue_send(&net->queues[TRANSMIT], sizeof(((struct packet *)0)->header) + length);
}

static void send_arp(struct virtio_device *net, uint16_t operation, const uint8_t *mac, uint32_t address)
{
    bool asks = operation == ARP_REQUEST;
    struct frame *frame = new_frame(net, asks ? everybody : mac, TYPE_ARP);

    if (!frame)
        return;
    frame->arp = (struct arp){ARP_ETHERNET, TYPE_IPV4, 6, 4, operation, {0}, net_address, {0}, address};
    memcpy(frame->arp.sender_mac, net->mac, 6);
    memcpy(frame->arp.target_mac, asks ? nobody : mac, 6);
    send(net, sizeof frame->ethernet + sizeof frame->arp);
}

static void receive_arp(struct virtio_device *net, const struct arp *arp, uint32_t length)
{
    bool for_us = arp->target == net_address;

    if (length < sizeof *arp || arp->hardware != ARP_ETHERNET || arp->protocol != TYPE_IPV4)
        return;
    learn(arp->sender, arp->sender_mac, for_us);
    if (for_us && arp->operation == ARP_REQUEST)
        send_arp(net, ARP_REPLY, arp->sender_mac, arp->sender);
}

/* Send an echo request back to where it came from. */
static void answer_echo(struct virtio_device *net, const struct frame *request, uint32_t header_length)
{
    struct frame *frame = new_frame(net, request->ethernet.from, TYPE_IPV4);
    uint32_t length = BE16(request->ipv4.length), sum;
    struct icmp *icmp;

    if (!frame)
        return;
    memcpy(&frame->ipv4, &request->ipv4, length);
    frame->ipv4.from = request->ipv4.to;
    frame->ipv4.to = request->ipv4.from;
    frame->ipv4.ttl = IPV4_TTL;
    frame->ipv4.checksum = 0;
    frame->ipv4.checksum = checksum(&frame->ipv4, header_length);
    icmp = (void *)frame + sizeof frame->ethernet + header_length;
    icmp->type = ECHO_REPLY;
    /* The type has become smaller by this, so the checksum becomes larger (RFC 1624). */
    sum = icmp->checksum + (ECHO_REQUEST - ECHO_REPLY);
    icmp->checksum = sum + (sum >> 16);
    send(net, sizeof frame->ethernet + length);
}

static void receive_ipv4(struct virtio_device *net, const struct frame *frame, uint32_t room,
                         uint32_t time_left)
{
    const struct ipv4 *ipv4 = &frame->ipv4;
    uint32_t header_length = (ipv4->version & 0xf) * 4, length = BE16(ipv4->length);
    const struct icmp *icmp = (const void *)ipv4 + header_length;

    if (room < sizeof *ipv4 || ipv4->version >> 4 != 4 || header_length < sizeof *ipv4 || length > room ||
        length < header_length + sizeof *icmp || checksum(ipv4, header_length))
        return;
    if (ipv4->to != net_address || ipv4->protocol != PROTOCOL_ICMP || ipv4->fragment & IPV4_FRAGMENT ||
        checksum(icmp, length - header_length) || icmp->code)
        return;
    if (icmp->type == ECHO_REQUEST) {
        answer_echo(net, frame, header_length);
    } else if (icmp->type == ECHO_REPLY && ipv4->from == echo_address && icmp->id == ECHO_ID &&
               icmp->sequence == BE16(echo_sequence)) {
        echo_answer.nanoseconds = SECOND - time_left;
        echo_answer.length = sizeof frame->ethernet + room;
        echo_answered = true;
        echo_address = 0;
    }
}

static void receive(struct virtio_device *net, const struct packet *packet, uint32_t length)
{
    const struct frame *frame = &packet->frame;
    uint32_t headers = sizeof packet->header + sizeof frame->ethernet;
    /* Looked at now: checking a frame takes longer than carrying it, where instructions are interpreted. */
    uint32_t time_left = echo_address ? timer_left() : 0;

    if (net->number || !net_address || length < headers || length > BUFFER_SIZE)
        return;
    if (frame->ethernet.type == TYPE_ARP)
        receive_arp(net, &frame->arp, length - headers);
    else if (frame->ethernet.type == TYPE_IPV4)
        receive_ipv4(net, frame, length - headers, time_left);
}

static void serve(struct virtio_device *net)
{
    struct virtqueue *queue = &net->queues[RECEIVE];
    struct packet *packet;
    uint32_t length;

    while (queue_ready(queue)) {
        packet = queue_take(queue, &length);
        receive(net, packet, length);
        queue_give_back(queue, packet);
    }
    queue_kick(queue);
}

static void configure(struct virtio_device *net)
{
    static const uint8_t local[5] = {0x02, 'l', 'g', 's', 't'};

    if (virtio_has(net, VIRTIO_NET_F_MAC)) {
        virtio_config(net, 0, net->mac, 1, 6);
    } else {
        memcpy(net->mac, local, 5);
        net->mac[5] = net->number;
    }
}

uint32_t net_next_hop(uint32_t address)
{
    return net_gateway && (address ^ net_address) & net_mask ? net_gateway : address;
}

/* Sleep until an interrupt; false when the time is over, or the network card is gone. */
static bool wait_for_network(void)
{
    if (!timer_left() || !virtio_find(&net_driver, 0))
        return false;
    idle();
    return true;
}

bool net_resolve(uint32_t address)
{
    for (int tries = 3; tries && !find_neighbour(address); tries--) {
        struct virtio_device *net = virtio_find(&net_driver, 0);

        if (!net)
            return false;
        timer_start(SECOND);
        send_arp(net, ARP_REQUEST, nobody, address);
        while (!find_neighbour(address) && wait_for_network())
            ;
        timer_stop();
    }
    return find_neighbour(address);
}

#define ECHO_FRAME (sizeof(struct ethernet) + sizeof(struct ipv4) + sizeof(struct icmp) + ECHO_BYTES)

static struct frame *new_echo(struct virtio_device *net, uint32_t address, const uint8_t *mac)
{
    struct frame *frame = new_frame(net, mac, TYPE_IPV4);
    struct icmp *icmp = (void *)(&frame->ipv4 + 1);

    if (!frame)
        return NULL;
    frame->ipv4 = (struct ipv4){
        .version = IPV4_SHORTEST,
        .length = BE16(ECHO_FRAME - sizeof(struct ethernet)),
        .id = BE16(echo_sequence),
        .ttl = IPV4_TTL,
        .protocol = PROTOCOL_ICMP,
        .from = net_address,
        .to = address,
    };
    frame->ipv4.checksum = checksum(&frame->ipv4, sizeof frame->ipv4);
    *icmp = (struct icmp){ECHO_REQUEST, 0, 0, ECHO_ID, BE16(echo_sequence)};
    memcpy(icmp->data, echo_data, ECHO_BYTES);
    icmp->checksum = checksum(icmp, sizeof *icmp + ECHO_BYTES);
    return frame;
}

bool net_ping(uint32_t address, uint32_t next_hop, struct echo *echo)
{
    struct virtio_device *net = virtio_find(&net_driver, 0);
    struct neighbour *neighbour = find_neighbour(next_hop);
    struct frame *frame;

    if (!net || !neighbour)
        return false;
    echo_sequence++;
    echo_address = address;
    echo_answered = false;
    frame = new_echo(net, address, neighbour->mac);
    timer_start(SECOND);
    if (frame)
        send(net, ECHO_FRAME);
    while (!echo_answered && wait_for_network())
        ;
    timer_stop();
    echo_address = 0;
    *echo = echo_answer;
    return echo_answered;
}

/* An ARP request for the gateway is as good a frame as any. */
static void submit(struct virtio_device *net)
{
    if (!net->number && net_gateway)
        send_arp(net, ARP_REQUEST, nobody, net_gateway);
}

const struct driver net_driver = {
    .type = VIRTIO_ID_NET,
    .name = "net",
    .features = (const struct feature[]){{VIRTIO_NET_F_MAC, "MAC"}, {0, NULL}},
    .queue_count = 2,
    .queues = {{"receive", 64, BUFFER_SIZE, true}, {"transmit", 64, BUFFER_SIZE, false}},
    .configure = configure,
    .serve = serve,
    .submit = submit,
};
