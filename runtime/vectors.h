/* Vectors as wide as the processor's, by GCC's and Clang's extension. They need no alignment. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VECTOR(type, lanes) type __attribute__((vector_size(sizeof(type) * (lanes)), aligned(sizeof(type)), may_alias))
#define CHOOSE(mask, yes, no) (((mask) & (yes)) | (~(mask) & (no)))
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#ifdef __AVX512F__
#define WIDE 16 /* floats in a register, of which there are 32 */
#else
#define WIDE 8
#endif

typedef VECTOR(float, WIDE) wide;
typedef VECTOR(int32_t, WIDE) wide_ints;
typedef VECTOR(uint8_t, WIDE) wide_bytes;

INLINE wide at(const float *x) { return *(const wide *)x; }
INLINE void put(float *x, wide values) { *(wide *)x = values; }
INLINE wide all(float x) { return x - (wide){0}; }

/* Keep a value in a register: GCC would load it anew for each use, and loads are the bottleneck. */
INLINE wide held(wide values) {
#ifdef __AVX__
    __asm__("" : "+v"(values));
#endif
    return values;
}

/* Whether all these numbers are so small that no sum of 30,000 products of two overflows. NaN is not. */
INLINE int small(const float *x, int n) {
    int all = 1;
    for (int i = 0; i < n; i++) all &= __builtin_fabsf(x[i]) < 1e17f;
    return all;
}
