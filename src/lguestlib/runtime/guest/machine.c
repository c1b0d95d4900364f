#include "machine.h"

#include <stdarg.h>

#include "text.h"
#include "transport.h"
#include "x86.h"

/* Ports of the machine that runs us. */
#define PORT_LAST_WORDS 0xe9
#define PORT_EXIT 0xf4
#define PORT_KEYBOARD 0x64
#define KEYBOARD_RESET 0xfe
#define PORT_PIC_MASK 0x21
#define PORT_PIC2_MASK 0xa1

/* boot_params, by offset. */
#define E820_ENTRIES 0x1e8
#define E820_TABLE 0x2d0
#define E820_RAM 1

/* The local APIC's registers (Intel SDM, volume 3, chapter "APIC"). */
#define LAPIC 0xfee00000u
#define LAPIC_ID (LAPIC + 0x020)
#define LAPIC_EOI (LAPIC + 0x0b0)
#define LAPIC_SPURIOUS (LAPIC + 0x0f0)
#define LAPIC_LVT_TIMER (LAPIC + 0x320)
#define LAPIC_LVT_LINT0 (LAPIC + 0x350)
#define LAPIC_TIMER_INITIAL (LAPIC + 0x380)
#define LAPIC_TIMER_CURRENT (LAPIC + 0x390)
#define LAPIC_TIMER_DIVIDE (LAPIC + 0x3e0)
#define LAPIC_ENABLE (1 << 8)
#define LVT_MASKED (1 << 16)
#define DIVIDE_BY_1 0xb

/* The I/O APIC's window, and the two registers of a line's redirection entry. */
#define IOAPIC_SELECT 0xfec00000u
#define IOAPIC_WINDOW 0xfec00010u
#define IOAPIC_LOW(line) (0x10 + 2 * (line))
#define IOAPIC_HIGH(line) (0x11 + 2 * (line))

/* Vectors: exceptions, then the lines, then the local APIC's own, then messages. */
#define EXCEPTIONS 32
#define VECTOR_TIMER 0x38
#define VECTOR_SPURIOUS 0x3f
#define FIRST_MESSAGE 0x40
#define VECTORS (FIRST_MESSAGE + MESSAGES)

/* Exceptions that push an error code below EIP. */
#define WITH_ERROR_CODE 0x60227d00u

#define CODE_SELECTOR 0x10
#define INTERRUPT_GATE 0x8e00

struct gate {
    uint16_t offset_low, selector, kind, offset_high;
};

extern const uint8_t interrupt_stubs[][8];
extern uint8_t image_end[];

static struct gate idt[VECTORS];
static uint32_t memory_mib;
static uintptr_t free_memory, memory_end;

/* Set by the handler, cleared by whoever slept. */
static volatile bool interrupted;

struct e820_entry {
    uint64_t start, size;
    uint32_t type;
} __attribute__((packed));

static void read_memory_map(const uint8_t *boot_params)
{
    const struct e820_entry *entry = (const void *)(boot_params + E820_TABLE);
    uint64_t here = (uintptr_t)image_end, total = 0;

    for (unsigned left = boot_params[E820_ENTRIES]; left; left--, entry++) {
        if (entry->type != E820_RAM)
            continue;
        total += entry->size;
        if (here - entry->start < entry->size) {
            uint64_t end = entry->start + entry->size;
            memory_end = end > LAPIC ? LAPIC : end;
        }
    }
    /* The PC's hole below 1 MiB is not counted. */
    memory_mib = (total + (1 << 20) - 1) >> 20;
    free_memory = (uintptr_t)image_end;
}

static void load_idt(void)
{
    struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) idtr = {sizeof idt - 1, (uintptr_t)idt};

    for (unsigned vector = 0; vector < VECTORS; vector++) {
        uintptr_t stub = (uintptr_t)interrupt_stubs[vector];
        idt[vector] = (struct gate){stub, CODE_SELECTOR, INTERRUPT_GATE, stub >> 16};
    }
    asm volatile("lidt %0" : : "m"(idtr), "m"(idt));
}

void machine_start(const uint8_t *boot_params)
{
    read_memory_map(boot_params);
    load_idt();
    /* Every line reaches both the old controllers and the I/O APIC: the old ones are kept out. */
    out8(PORT_PIC_MASK, 0xff);
    out8(PORT_PIC2_MASK, 0xff);
    write32(LAPIC_LVT_LINT0, LVT_MASKED);
    write32(LAPIC_SPURIOUS, LAPIC_ENABLE | VECTOR_SPURIOUS);
    /* Undivided it counts nanoseconds: KVM_APIC_BUS_CYCLE_NS is 1. */
    write32(LAPIC_TIMER_DIVIDE, DIVIDE_BY_1);
    write32(LAPIC_LVT_TIMER, VECTOR_TIMER);
    asm volatile("sti");
}

uint32_t machine_memory(void)
{
    return memory_mib;
}

void *allocate(size_t length)
{
    uintptr_t start = (free_memory + 15) & ~15u;

    if (start > memory_end || length > memory_end - start)
        die("out of memory");
    free_memory = start + length;
    return (void *)start;
}

static void ioapic_write(uint32_t index, uint32_t value)
{
    write32(IOAPIC_SELECT, index);
    write32(IOAPIC_WINDOW, value);
}

void interrupt_enable(uint32_t line)
{
    /* Edge-triggered, active high, to this CPU. */
    ioapic_write(IOAPIC_HIGH(line), read32(LAPIC_ID));
    ioapic_write(IOAPIC_LOW(line), EXCEPTIONS + line);
}

uint32_t message_address(void)
{
    /* To this CPU, whose ID is in the same bits in both. */
    return LAPIC | (read32(LAPIC_ID) >> 24 << 12);
}

uint32_t message_data(uint32_t message)
{
    return FIRST_MESSAGE + message;
}

/* Called by interrupt_entry; *pushed is what the CPU has put on the stack. */
void interrupt(uint32_t vector, const uint32_t *pushed)
{
    if (vector < EXCEPTIONS) {
        uint32_t eip = WITH_ERROR_CODE >> vector & 1 ? pushed[1] : pushed[0];
        last_words("panic: exception %u at 0x%8x", vector, eip);
        power_off(255);
    }
    if (vector == VECTOR_SPURIOUS)
        return;
    if (vector >= FIRST_MESSAGE)
        pci_interrupt(vector - FIRST_MESSAGE);
    else if (vector != VECTOR_TIMER)
        mmio_interrupt(vector - EXCEPTIONS);
    interrupted = true;
    write32(LAPIC_EOI, 0);
}

void machine_sleep(void)
{
    asm volatile("cli" : : : "memory");
    /* STI takes effect after HLT has begun, so no interrupt slips in between. */
    if (!interrupted)
        asm volatile("sti; hlt" : : : "memory");
    /* Cleared before the caller looks at its rings: what comes later is seen there or sets it again. */
    interrupted = false;
    asm volatile("sti" : : : "memory");
}

void timer_start(uint32_t nanoseconds)
{
    write32(LAPIC_TIMER_INITIAL, nanoseconds);
}

uint32_t timer_left(void)
{
    return read32(LAPIC_TIMER_CURRENT);
}

void timer_stop(void)
{
    write32(LAPIC_TIMER_INITIAL, 0);
}

static void put_last_word(char character)
{
    out8(PORT_LAST_WORDS, character);
}

void last_words(const char *text, ...)
{
    va_list arguments;

    va_start(arguments, text);
    format(put_last_word, text, arguments);
    va_end(arguments);
    put_last_word('\n');
}

void die(const char *text)
{
    last_words("panic: %s", text);
    power_off(255);
}

static void halt(void) __attribute__((noreturn));

static void halt(void)
{
    for (;;)
        asm volatile("cli; hlt");
}

void power_off(uint8_t verdict)
{
    out8(PORT_EXIT, verdict);
    halt();
}

void reboot(void)
{
    out8(PORT_KEYBOARD, KEYBOARD_RESET);
    halt();
}
