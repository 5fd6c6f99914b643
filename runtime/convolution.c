/* The second convolution of the CNN with max-pooling and ReLU, in float32: images of 14x14 pixels with 32 channels.

   Compiled by kernels.py, which says what each function computes, and calls it. Pixels lie in rows, channels last.
   Forward, Winograd's algorithm F(2x2, 3x3) makes the four pixels of a window by 16 products instead of 36 (Lavin and
   Gray 2016, arXiv:1509.09308). Its tiles of 4x4 pixels are just those that a window of the pooling needs.
   Max-pooling passes the gradient to one pixel in four, and ReLU stops it where the window gives 0. So most products
   of a convolution's backward pass are with zeros: backward() lists the others, and computes only them. */

#include "vectors.h"

#define SIDE 14
#define HALF (SIDE / 2)
#define POOLED (HALF * HALF)
#define INPUTS 32
#define ROW ((SIDE + 2) * INPUTS)    /* floats in a row of the padded image */
#define PADDED (ROW * (SIDE + 2))    /* and in the whole */
#define IMAGE (SIDE * SIDE * INPUTS) /* and without its border */
#define PARTS (INPUTS / WIDE)
#define HELD (WIDE == 16 ? 2 : 1)    /* of these parts, as many as add_to_weight can hold for nine taps in registers */
#define DEAD 4                       /* where ReLU gave 0: no pixel of the window gets the gradient */
#define VECTORS (WIDE == 16 ? 2 : 1) /* of outputs, as many as the registers hold for the windows of a row */
#define PRODUCTS (HALF * VECTORS * WIDE)

/* An image with a border of one zero pixel. */
static void pad(float *padded, const float *image) {
    memset(padded, 0, sizeof(float) * PADDED);
    for (int y = 0; y < SIDE; y++)
        memcpy(padded + (y + 1) * ROW + INPUTS, image + y * SIDE * INPUTS, sizeof(float) * SIDE * INPUTS);
}

/* Four rows of a padded image -> tiles (16, HALF, INPUTS): what Winograd makes of the 4x4 pixels around each window. */
static void transform(const float *rows, float *tiles) {
    for (int x = 0; x < HALF; x++)
        for (int c = 0; c < INPUTS; c += WIDE) {
            wide down[16]; /* the columns are transformed, then the rows */
            UNROLL for (int j = 0; j < 4; j++) {
                const float *p = rows + (2 * x + j) * INPUTS + c;
                wide d[4] = {at(p), at(p + ROW), at(p + 2 * ROW), at(p + 3 * ROW)};
                down[j] = d[0] - d[2], down[4 + j] = d[1] + d[2], down[8 + j] = d[2] - d[1], down[12 + j] = d[1] - d[3];
            }
            float *to = tiles + x * INPUTS + c;
            UNROLL for (int i = 0; i < 16; i += 4, to += 4 * HALF * INPUTS) {
                put(to, down[i] - down[i + 2]), put(to + HALF * INPUTS, down[i + 1] + down[i + 2]);
                put(to + 2 * HALF * INPUTS, down[i + 2] - down[i + 1]);
                put(to + 3 * HALF * INPUTS, down[i + 1] - down[i + 3]);
            }
        }
}

/* One of the 16 places in the tiles, with its weight, for VECTORS * WIDE outputs -> products (HALF, VECTORS * WIDE). */
static void multiply(const float *tiles, const float *weight, float *products, int outputs) {
    wide sum[HALF * VECTORS] = {0};
    for (int c = 0; c < INPUTS; c++, weight += outputs) {
        wide w[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) w[v] = held(at(weight + v * WIDE));
        UNROLL for (int x = 0; x < HALF; x++) {
            wide pixel = held(all(tiles[x * INPUTS + c]));
            UNROLL for (int v = 0; v < VECTORS; v++) sum[x * VECTORS + v] += pixel * w[v];
        }
    }
    UNROLL for (int i = 0; i < HALF * VECTORS; i++) put(products + i * WIDE, sum[i]);
}

/* The 16 products of a window, for WIDE outputs -> its maximum over the four pixels, and the place of that. */
static void pool(const float *products, wide bias, float *output, uint8_t *place) {
    wide upper[4], lower[4], maximum = {0};
    wide_ints number = (wide_ints){0} + DEAD;
    UNROLL for (int j = 0; j < 4; j++) {
        wide m[4];
        UNROLL for (int i = 0; i < 4; i++) m[i] = at(products + (4 * i + j) * PRODUCTS);
        upper[j] = m[0] + m[1] + m[2], lower[j] = m[1] - m[2] - m[3];
    }
    wide values[4] = {upper[0] + upper[1] + upper[2], upper[1] - upper[2] - upper[3], lower[0] + lower[1] + lower[2],
                      lower[1] - lower[2] - lower[3]};
    UNROLL for (int p = 0; p < 4; p++) {
        wide value = values[p] + bias;
        wide_ints larger = value > maximum;
        maximum = (wide)CHOOSE(larger, (wide_ints)value, (wide_ints)maximum);
        number = CHOOSE(larger, (wide_ints){0} + p, number);
    }
    put(output, maximum);
    if (place) *(wide_bytes *)place = __builtin_convertvector(number, wide_bytes);
}

/* images (n, SIDE, SIDE, INPUTS), weight (16, INPUTS, outputs), transformed by kernels.py, bias (outputs)
   -> output and, unless it is missing, place (n, HALF, HALF, outputs).
   Returns 0 where a number is not small. The output is then worth nothing: a window could lose its NaN. */
int forward(const float *images, const float *weight, const float *bias, float *output, uint8_t *place, int n,
            int outputs, int threads) {
    int usual = small(weight, 16 * INPUTS * outputs) && small(bias, outputs);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) reduction(&& : usual)
    for (int i = 0; i < n; i++) {
        float padded[PADDED], tiles[16 * HALF * INPUTS], products[16 * PRODUCTS];
        pad(padded, images + (size_t)i * IMAGE);
        if (!small(images + (size_t)i * IMAGE, IMAGE)) usual = 0;
        for (int y = 0; y < HALF; y++) {
            transform(padded + 2 * y * ROW, tiles);
            for (int block = 0; block < outputs; block += VECTORS * WIDE) {
                for (int t = 0; t < 16; t++)
                    multiply(tiles + t * HALF * INPUTS, weight + t * INPUTS * outputs + block, products + t * PRODUCTS,
                             outputs);
                for (int x = 0; x < HALF; x++)
                    for (int o = 0; o < VECTORS * WIDE; o += WIDE) {
                        size_t here = (((size_t)i * HALF + y) * HALF + x) * outputs + block + o;
                        pool(products + x * VECTORS * WIDE + o, at(bias + block + o), output + here,
                             place ? place + here : 0);
                    }
            }
        }
    }
    return usual;
}

/* Gradient and place of an image's windows -> for each output a list of the pixels that get a gradient: where they
   are in a padded image, and how much they get; how many they are; and the gradient of the bias is added up. */
static void list(const float *gradient, const uint8_t *place, float *value, int *pixel, int *count, float *bias,
                 int outputs) {
    memset(count, 0, sizeof(int) * outputs);
    for (int window = 0; window < POOLED; window++, gradient += outputs, place += outputs) {
        int corner = 2 * (window / HALF) * ROW + 2 * (window % HALF) * INPUTS;
        const int pixels[DEAD + 1] = {corner, corner + INPUTS, corner + ROW, corner + ROW + INPUTS, 0};
        for (int o = 0; o < outputs; o++) {
            int next = o * POOLED + count[o], alive = place[o] != DEAD; /* a later pixel takes the place of a dead one */
            value[next] = gradient[o], pixel[next] = pixels[place[o]];
            count[o] += alive, bias[o] += alive ? gradient[o] : 0;
        }
    }
}

/* Add the listed pixels of one output to its gradient (9, INPUTS). */
static void add_to_weight(float *sum, const float *padded, const float *value, const int *pixel, int count) {
    for (int first = 0; first < INPUTS; first += HELD * WIDE) {
        float *own = sum + first;
        wide sums[9][HELD];
        UNROLL for (int i = 0; i < 9 * HELD; i++)
            sums[i / HELD][i % HELD] = at(own + i / HELD * INPUTS + i % HELD * WIDE);
        for (int e = 0; e < count; e++) {
            const float *x = padded + pixel[e] + first;
            UNROLL for (int tap = 0; tap < 9; tap++)
                UNROLL for (int part = 0; part < HELD; part++)
                    sums[tap][part] += value[e] * at(x + tap / 3 * ROW + tap % 3 * INPUTS + part * WIDE);
        }
        UNROLL for (int i = 0; i < 9 * HELD; i++)
            put(own + i / HELD * INPUTS + i % HELD * WIDE, sums[i / HELD][i % HELD]);
    }
}

/* Add what the listed pixels of one output, of this weight (9, INPUTS), give to the gradient of the padded image. */
static void add_to_image(float *padded, const float *weight, const float *value, const int *pixel, int count) {
    wide w[9][PARTS];
    UNROLL for (int i = 0; i < 9 * PARTS; i++) w[i / PARTS][i % PARTS] = at(weight + i * WIDE);
    for (int e = 0; e < count; e++) {
        float *x = padded + pixel[e];
        UNROLL for (int tap = 0; tap < 9; tap++)
            UNROLL for (int part = 0; part < PARTS; part++) {
                float *to = x + tap / 3 * ROW + tap % 3 * INPUTS + part * WIDE;
                put(to, at(to) + value[e] * w[tap][part]);
            }
    }
}

/* images, weight (outputs, 9, INPUTS), gradient and place of the output -> gradient of the images, unless it is
   missing; and, as sums of each share of the images, of the weight (shares, outputs, 9, INPUTS) and of the bias
   (shares, outputs), which begin at 0. The shares do not depend on the threads, and so no bit does. */
void backward(const float *images, const float *weight, const float *gradient, const uint8_t *place, float *result,
              float *weights, float *biases, int n, int outputs, int shares, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int share = 0; share < shares; share++) {
        float padded[PADDED], value[outputs * POOLED];
        int pixel[outputs * POOLED], count[outputs];
        float *sum = weights + (size_t)share * outputs * 9 * INPUTS;
        for (int i = (int)((int64_t)n * share / shares); i < (int64_t)n * (share + 1) / shares; i++) {
            size_t here = (size_t)i * POOLED * outputs;
            list(gradient + here, place + here, value, pixel, count, biases + (size_t)share * outputs, outputs);
            pad(padded, images + (size_t)i * IMAGE);
            for (int o = 0; o < outputs; o++)
                add_to_weight(sum + o * 9 * INPUTS, padded, value + o * POOLED, pixel + o * POOLED, count[o]);
            if (!result) continue;
            memset(padded, 0, sizeof padded);
            for (int o = 0; o < outputs; o++)
                add_to_image(padded, weight + o * 9 * INPUTS, value + o * POOLED, pixel + o * POOLED, count[o]);
            for (int y = 0; y < SIDE; y++)
                memcpy(result + (size_t)i * IMAGE + y * SIDE * INPUTS, padded + (y + 1) * ROW + INPUTS,
                       sizeof(float) * SIDE * INPUTS);
        }
    }
}
