/*
 * The way in, and the way in and out of interrupts.
 *
 * Entered by Linux's 32-bit boot protocol: flat segments, interrupts off, %esi
 * the address of boot_params.  The C code takes its first three arguments in
 * %eax, %edx and %ecx (-mregparm=3).
 */

        .text
        .globl start
start:
        cld
        movl    $stack_top, %esp
        lgdt    gdt_register
        movl    %esi, %eax
        call    guest_main

/*
 * One stub of 8 bytes for each vector: interrupt_stubs + 8 * vector.
 */
        .balign 8
        .globl interrupt_stubs
interrupt_stubs:
        vector = 0
        .rept   128
        .balign 8
        pushl   $vector
        jmp     interrupt_entry
        vector = vector + 1
        .endr

/*
 * KVM's instruction emulator has no IRET in protected mode.  Its work is done by
 * POPF and RET: EFLAGS and EIP change places, so that both leave the stack in
 * that order and an interrupt taken right after POPF does no harm.
 */
        .equ    VECTOR, 32      /* above the eight registers of PUSHA */
        .equ    EIP, 36
        .equ    CS, 40
        .equ    EFLAGS, 44

interrupt_entry:
        pusha
        cld
        movl    VECTOR(%esp), %eax
        leal    EIP(%esp), %edx
        call    interrupt
        movl    EIP(%esp), %eax
        movl    EFLAGS(%esp), %edx
        movl    %eax, EFLAGS(%esp)
        movl    %edx, CS(%esp)
        popa
        addl    $8, %esp        /* the vector, and where EIP was */
        popf
        ret

        .section .rodata
        .balign 8
gdt:
        .quad   0, 0
        .quad   0x00cf9b000000ffff      /* 0x10: code, 0 to 4 GiB */
        .quad   0x00cf93000000ffff      /* 0x18: data, 0 to 4 GiB */
gdt_register:
        .word   . - gdt - 1
        .long   gdt

        .bss
        .balign 16
        .skip   8192
stack_top:

/* What built it, beside what the compiler says of itself. */
        .section .comment
        .asciz  LINKER

        .section .note.GNU-stack, "", @progbits
