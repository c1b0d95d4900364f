/* Instructions C has no words for. */

#ifndef X86_H
#define X86_H

#include <stdint.h>

static inline void out8(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(uint16_t port, uint32_t value)
{
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint32_t in32(uint16_t port)
{
    uint32_t value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* Device registers: one access of the given width, and a form of MOV that any emulator knows. */

static inline uint32_t read32(uintptr_t address)
{
    uint32_t value;
    asm volatile("movl %1, %0" : "=r"(value) : "m"(*(volatile uint32_t *)address) : "memory");
    return value;
}

static inline uint16_t read16(uintptr_t address)
{
    uint16_t value;
    asm volatile("movw %1, %0" : "=r"(value) : "m"(*(volatile uint16_t *)address) : "memory");
    return value;
}

static inline uint8_t read8(uintptr_t address)
{
    uint8_t value;
    asm volatile("movb %1, %0" : "=q"(value) : "m"(*(volatile uint8_t *)address) : "memory");
    return value;
}

static inline void write32(uintptr_t address, uint32_t value)
{
    asm volatile("movl %1, %0" : "=m"(*(volatile uint32_t *)address) : "r"(value) : "memory");
}

static inline void write16(uintptr_t address, uint16_t value)
{
    asm volatile("movw %1, %0" : "=m"(*(volatile uint16_t *)address) : "r"(value) : "memory");
}

static inline void write8(uintptr_t address, uint8_t value)
{
    asm volatile("movb %1, %0" : "=m"(*(volatile uint8_t *)address) : "q"(value) : "memory");
}

/* x86 keeps loads in order, and stores: there the compiler alone has to be held back. */
static inline void barrier(void)
{
    asm volatile("" : : : "memory");
}

/* A load may still pass a store before it: a locked instruction lets none through. */
static inline void fence(void)
{
    asm volatile("lock; addl $0, (%%esp)" : : : "memory", "cc");
}

#endif
