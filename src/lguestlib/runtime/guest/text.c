#include "text.h"

/* Divide *value; return the remainder.  Two steps of long division, for want of a library. */
static uint32_t divide(uint64_t *value, uint32_t by)
{
    uint32_t high = *value >> 32, low = *value, remainder = high % by;

    high /= by;
    asm("divl %4" : "=a"(low), "=d"(remainder) : "0"(low), "1"(remainder), "r"(by) : "cc");
    *value = (uint64_t)high << 32 | low;
    return remainder;
}

static void put_number(void (*put)(char), uint64_t value, uint32_t base, int width)
{
    char digits[20];
    int count = 0;

    do
        digits[count++] = "0123456789abcdef"[divide(&value, base)];
    while (value);
    for (; width > count; width--)
        put('0');
    while (count)
        put(digits[--count]);
}

void format(void (*put)(char), const char *text, va_list arguments)
{
    for (; *text; text++) {
        int width = 0;

        if (*text != '%') {
            put(*text);
            continue;
        }
        if (*++text >= '0' && *text <= '9')
            width = *text++ - '0';
        switch (*text) {
        case 's':
            for (const char *string = va_arg(arguments, const char *); *string; string++)
                put(*string);
            break;
        case 'u':
            put_number(put, va_arg(arguments, uint32_t), 10, width);
            break;
        case 'x':
            put_number(put, va_arg(arguments, uint32_t), 16, width);
            break;
        case 'l':
            put_number(put, va_arg(arguments, uint64_t), 10, width);
            break;
        case 'a':
            for (uint32_t address = va_arg(arguments, uint32_t), i = 0; i < 4; i++, address >>= 8) {
                if (i)
                    put('.');
                put_number(put, address & 0xff, 10, 0);
            }
            break;
        }
    }
}

static uint32_t digit(char character)
{
    if (character >= '0' && character <= '9')
        return character - '0';
    character |= 0x20;
    return character >= 'a' && character <= 'f' ? character - 'a' + 10 : 16;
}

const char *scan_number(const char *text, uint64_t *value)
{
    uint32_t base = 10;
    uint64_t limit = UINT64_MAX / 10, sum = 0;

    if (text[0] == '0' && (text[1] | 0x20) == 'x') {
        base = 16;
        limit = UINT64_MAX / 16;
        text += 2;
    }
    if (digit(*text) >= base)
        return NULL;
    for (; digit(*text) < base; text++) {
        uint64_t scaled = sum * base;

        if (sum > limit || scaled + digit(*text) < scaled)
            return NULL;
        sum = scaled + digit(*text);
    }
    *value = sum;
    return text;
}

const char *scan_address(const char *text, uint32_t *address)
{
    uint32_t sum = 0;

    for (int shift = 0; shift < 32; shift += 8) {
        uint32_t octet = 0;

        if (shift && *text++ != '.')
            return NULL;
        if (digit(*text) >= 10)
            return NULL;
        for (; digit(*text) < 10; text++) {
            octet = octet * 10 + digit(*text);
            if (octet > 255)
                return NULL;
        }
        sum |= octet << shift;
    }
    *address = sum;
    return text;
}

size_t strlen(const char *text)
{
    size_t length = 0;

    while (text[length])
        length++;
    return length;
}

int strcmp(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return (uint8_t)*a - (uint8_t)*b;
}

void *memcpy(void *to, const void *from, size_t length)
{
    void *start = to;
    size_t words = length / 4, rest = length % 4;

    asm volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(rest) : : "memory");
    return start;
}

void *memset(void *to, int byte, size_t length)
{
    void *start = to;

    asm volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t length)
{
    const uint8_t *left = a, *right = b;

    for (; length && *left == *right; length--) {
        left++;
        right++;
    }
    return length ? *left - *right : 0;
}
