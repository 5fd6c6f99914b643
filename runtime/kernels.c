/* The memory-bound half of the CNN's training step, each part in one pass over its data.

   Compiled by kernels.py, which says what each function computes, and calls it. Activations lie channels last,
   channels a multiple of 32; they are bfloat16, or float where FLOAT is defined. The vectors are those of GCC and
   Clang, so any processor will do. NaN is passed on by the pooling, as PyTorch does; the convolution refuses it. */

#include "vectors.h"

#define SIZE 28 /* rows and columns of an image */
#define POOLED (SIZE / 2)
#define ROW (SIZE + 4) /* floats from one row of the padded image to the next */
#define DEAD 4         /* where ReLU gave 0: no pixel of the window gets the gradient */

#ifdef FLOAT
typedef int32_t element; /* the bits of a float */
#define LANES WIDE
#define INFINITE 0x7f800000
#define POSITIVE 0x7fffffff /* all bits but the sign */
static inline wide load(const element *from) { return *(const wide *)from; }
static inline void store(element *to, wide x) { *(wide *)to = x; }
#else
typedef int16_t element; /* the bits of a bfloat16, the upper half of a float */
#define LANES (2 * WIDE)
#define INFINITE 0x7f80
#define POSITIVE 0x7fff
typedef VECTOR(int16_t, WIDE) shorts;
static inline wide load(const element *from) {
    return (wide)(__builtin_convertvector(*(const shorts *)from, wide_ints) << 16);
}
static inline void store(element *to, wide x) {
    wide_ints bits = (wide_ints)x;
    wide_ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even; of no NaN */
    *(shorts *)to = __builtin_convertvector(rounded, shorts);
}
#endif
typedef VECTOR(element, LANES) elements;
typedef VECTOR(uint8_t, LANES) places;

/* An image with a border of one zero pixel. */
static inline void pad(float padded[SIZE + 2][ROW], const float *image) {
    memset(padded, 0, sizeof(float) * (SIZE + 2) * ROW);
    for (int row = 0; row < SIZE; row++) memcpy(&padded[row + 1][1], image + row * SIZE, sizeof(float) * SIZE);
}

/* images (n, SIZE, SIZE), weight (9, channels), bias (channels)
   -> output and place (n, POOLED, POOLED, channels): of a 3x3 convolution, 2x2 max-pooling and ReLU.
   Returns 0 where a number is not small. The output is then worth nothing: a window could lose its NaN. */
int conv_pool_relu(const float *images, const float *weight, const float *bias, element *output, uint8_t *place,
                   int n, int channels, int threads) {
    int usual = small(weight, 9 * channels) && small(bias, channels);
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : usual)
    for (int i = 0; i < n; i++) {
        float padded[SIZE + 2][ROW];
        pad(padded, images + (size_t)i * SIZE * SIZE);
        if (!small(images + (size_t)i * SIZE * SIZE, SIZE * SIZE)) usual = 0;
        for (int c = 0; c < channels; c += WIDE) {
            wide w[9], b = *(const wide *)(bias + c);
            for (int tap = 0; tap < 9; tap++) w[tap] = *(const wide *)(weight + tap * channels + c);
            for (int row = 0; row < POOLED; row++)
                for (int column = 0; column < POOLED; column++) {
                    wide maximum = {0};
                    wide_ints at = (wide_ints){0} + DEAD;
#pragma GCC unroll 4
                    for (int number = 0; number < 4; number++) { /* of the pixel in the window */
                        const float *x = &padded[2 * row + number / 2][2 * column + number % 2];
                        wide sum = b + x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[ROW] * w[3] + x[ROW + 1] * w[4] +
                                   x[ROW + 2] * w[5] + x[2 * ROW] * w[6] + x[2 * ROW + 1] * w[7] +
                                   x[2 * ROW + 2] * w[8];
                        wide_ints larger = sum > maximum;
                        maximum = (wide)CHOOSE(larger, (wide_ints)sum, (wide_ints)maximum);
                        at = CHOOSE(larger, (wide_ints){0} + number, at);
                    }
                    size_t here = (((size_t)i * POOLED + row) * POOLED + column) * channels + c;
                    store(output + here, maximum);
                    *(wide_bytes *)(place + here) = __builtin_convertvector(at, wide_bytes);
                }
        }
    }
    return usual;
}

/* Gradient of the output -> of weight and bias, as sums (threads, 10, channels): nine taps, then the bias. Each
   thread adds up its own share. So the order of the sums, and with it every bit, is the same in each run. */
void conv_pool_relu_backward(const float *images, const element *gradient, const uint8_t *place, float *sums, int n,
                             int channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int share = 0; share < threads; share++)
        for (int i = (int)((int64_t)n * share / threads); i < (int64_t)n * (share + 1) / threads; i++) {
            float padded[SIZE + 2][ROW];
            pad(padded, images + (size_t)i * SIZE * SIZE);
            for (int c = 0; c < channels; c += WIDE) {
                wide w0 = {0}, w1 = {0}, w2 = {0}, w3 = {0}, w4 = {0}, w5 = {0}, w6 = {0}, w7 = {0}, w8 = {0}, b = {0};
                for (int row = 0; row < POOLED; row++)
                    for (int column = 0; column < POOLED; column++) {
                        size_t here = (((size_t)i * POOLED + row) * POOLED + column) * channels + c;
                        wide_ints g = (wide_ints)load(gradient + here);
                        wide_ints at = __builtin_convertvector(*(const wide_bytes *)(place + here), wide_ints);
                        b += (wide)(g & (at < DEAD));
#pragma GCC unroll 4
                        for (int number = 0; number < 4; number++) {
                            const float *x = &padded[2 * row + number / 2][2 * column + number % 2];
                            wide own = (wide)(g & (at == number));
                            w0 += x[0] * own, w1 += x[1] * own, w2 += x[2] * own;
                            w3 += x[ROW] * own, w4 += x[ROW + 1] * own, w5 += x[ROW + 2] * own;
                            w6 += x[2 * ROW] * own, w7 += x[2 * ROW + 1] * own, w8 += x[2 * ROW + 2] * own;
                        }
                    }
                const wide all[10] = {w0, w1, w2, w3, w4, w5, w6, w7, w8, b};
                for (int tap = 0; tap < 10; tap++)
                    *(wide *)(sums + ((size_t)share * 10 + tap) * channels + c) += all[tap];
            }
        }
}

/* input (n, 2 height, 2 width, channels) -> output and place (n, height, width, channels): 2x2 max-pooling and ReLU.
   It computes nothing, so it works on the elements' bits, which as integers are in the order of positive numbers. */
void pool_relu(const element *input, element *output, uint8_t *place, int n, int height, int width, int channels,
               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int row = 0; row < n * height; row++)
        for (int column = 0; column < width; column++)
            for (int c = 0; c < channels; c += LANES) {
                const element *x = input + ((size_t)row * 4 * width + 2 * column) * channels + c;
                elements maximum = {0}, at = (elements){0} + DEAD;
#pragma GCC unroll 4
                for (int number = 0; number < 4; number++) {
                    elements bits = *(const elements *)(x + (number / 2 * 2 * width + number % 2) * channels);
                    elements positive = bits & POSITIVE;
                    bits = CHOOSE(positive > INFINITE, positive, bits); /* NaN of either sign is above all numbers */
                    elements larger = bits > maximum;
                    maximum = CHOOSE(larger, bits, maximum);
                    at = CHOOSE(larger, (elements){0} + (element)number, at);
                }
                size_t here = ((size_t)row * width + column) * channels + c;
                *(elements *)(output + here) = maximum;
                *(places *)(place + here) = __builtin_convertvector(at, places);
            }
}

/* Gradient of the output -> of the input. */
void pool_relu_backward(const element *gradient, const uint8_t *place, element *result, int n, int height, int width,
                        int channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int row = 0; row < n * height; row++)
        for (int column = 0; column < width; column++)
            for (int c = 0; c < channels; c += LANES) {
                size_t here = ((size_t)row * width + column) * channels + c;
                element *x = result + ((size_t)row * 4 * width + 2 * column) * channels + c;
                elements g = *(const elements *)(gradient + here);
                elements at = __builtin_convertvector(*(const places *)(place + here), elements);
#pragma GCC unroll 4
                for (int number = 0; number < 4; number++)
                    *(elements *)(x + (number / 2 * 2 * width + number % 2) * channels) = g & (at == (element)number);
            }
}
