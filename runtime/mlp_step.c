/* A whole training step of a network with one hidden layer: ReLU, cross-entropy, gradients and Adam, in float32.
   Without Adam, it ends with the gradients.

   Compiled by kernels.py; mlp_step.py calls it. Each thread computes its share of the hidden units, forward,
   backward and Adam, so that their weights and moments stay in its cache. What is small, the answers of the second
   layer, every thread computes for itself. So the threads meet once within a step, and no sum depends on how many they
   are. A batch is worked off in parts that fit into the cache; with the last, a gradient goes from the registers into
   Adam. */

#include <math.h>
#include <omp.h>

#include "vectors.h"

#if WIDE == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#else
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#endif
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (wide_ints){__VA_ARGS__})
#endif

#define PART 128                     /* images at a time */
#define CLASSES 16                   /* room for the classes, a multiple of WIDE */
#define ROWS (WIDE == 16 ? 4 : 6)    /* images of a tile, forward */
#define COLUMNS (WIDE == 16 ? 4 : 2) /* hidden units of a tile, forward: 16 sums in 32 registers, or 12 in 16 */
#define RESULTS ((ROWS * COLUMNS + WIDE - 1) / WIDE) /* vectors that hold these sums in the end */
#define UNITS (WIDE / 2)             /* hidden units of a tile, backward */
#define PANEL (2 * WIDE)             /* inputs of a tile, backward; the images' bytes lie in panels of so many inputs */
#define LINE 64                      /* bytes of a line of the cache */

struct tensor { /* of the network: its state in Adam, and its gradient, of the parts before the last or in all */
    float *weight, *steps, *mean, *square, *gradient;
};
struct adam { /* learning rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - beta1, 1 - beta2, epsilon */
    float rate, correction, first, second, epsilon;
};

/* The sums of WIDE vectors, in one. */
INLINE wide sums(wide *v) {
    UNROLL for (int n = WIDE / 2; n > 0; n /= 2)
        UNROLL for (int i = 0; i < n; i++)
            v[i] = PICK(v[2 * i], v[2 * i + 1], EVEN) + PICK(v[2 * i], v[2 * i + 1], ODD);
    return v[0];
}

INLINE wide root(wide x) {
    wide y;
    UNROLL for (int i = 0; i < WIDE; i++) y[i] = __builtin_sqrtf(x[i]);
    return y;
}

/* e to the x, for x up to 0, within two units of the last place: 2 to the whole part of x / ln 2, times a polynomial
   of the rest, with Moshier's coefficients (Cephes, expf). */
INLINE wide power(wide x) {
    x = (wide)CHOOSE(x < -87.0f, (wide_ints)all(-87.0f), (wide_ints)x);
    wide shifted = x * 1.44269504f + 12582912.0f; /* its last bits are the whole part */
    wide whole = shifted - 12582912.0f;
    wide r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    wide p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    wide_ints result = (wide_ints)p + ((wide_ints)shifted << 23);
    return (wide)CHOOSE(x == x, result, (wide_ints)x); /* NaN stays */
}

/* Where a batch of n images is, in parts of PART: `from` is the first image of this one. */
struct part {
    int from, size, n;
};

/* With the last part Adam, if there is one; else the gradient is kept. */
INLINE void use(const struct adam *adam, struct part part, struct tensor t, size_t i, wide gradient) {
    if (!adam || part.from + part.size < part.n) {
        put(t.gradient + i, gradient);
        return;
    }
    const struct adam a = *adam;
    wide mean = at(t.mean + i), square = at(t.square + i);
    mean += (gradient - mean) * a.first;
    square += (gradient * gradient - square) * a.second;
    put(t.mean + i, mean), put(t.square + i, square);
    put(t.weight + i, at(t.weight + i) - a.rate * mean / (root(square) * a.correction + a.epsilon));
}

/* The same for the few values of a tensor that fill no vector. */
static void use_few(const struct adam *a, struct part part, struct tensor t, const float *gradient, int n) {
    float *const places[4] = {t.weight, t.mean, t.square, t.gradient};
    float room[5][CLASSES] = {{0}};
    const struct tensor wider = {room[0], 0, room[1], room[2], room[3]};
    for (int i = 0; i < 4; i++) memcpy(room[i], places[i], sizeof(float) * n);
    memcpy(room[4], gradient, sizeof(float) * n);
    if (part.from)
        for (int c = 0; c < n; c++) room[4][c] += t.gradient[c];
    for (int c = 0; c < CLASSES; c += WIDE) use(a, part, wider, c, at(room[4] + c));
    for (int i = 0; i < 4; i++) memcpy(places[i], room[i], sizeof(float) * n);
}

/* The gradient of the parts before this one. */
INLINE wide before(struct part part, struct tensor t, size_t i) { return part.from ? at(t.gradient + i) : (wide){0}; }

/* n pixels -> x, as pixel / 127.5 - 1. */
static void scale(const uint8_t *restrict pixels, float *restrict x, int n) {
    for (int i = 0; i < n; i++) x[i] = pixels[i] * (1 / 127.5f) - 1.0f;
}

/* The images b to b + ROWS - 1 of the part, by their index -> x (ROWS, inputs), and their bytes -> the panels of the
   part. In a last tile that is not full, the other rows of x keep what they had: what is computed from them is never
   read. Memory is asked for the images of the next tile. */
static void read_images(const uint8_t *images, const int64_t *index, float *x, uint8_t *panels, int b, int n,
                        int inputs) {
    for (int row = 0; row < ROWS && b + row < n; row++) {
        const uint8_t *image = images + index[b + row] * inputs;
        uint8_t *to = panels + (size_t)(b + row) * PANEL;
        scale(image, x + (size_t)row * inputs, inputs);
        int k = 0;
        for (; k + PANEL <= inputs; k += PANEL) memcpy(to + (size_t)k * PART, image + k, PANEL);
        if (k < inputs) memcpy(to + (size_t)k * PART, image + k, WIDE);
    }
    for (int next = b + ROWS; next < b + 2 * ROWS && next < n; next++)
        for (int k = 0; k < inputs; k += LINE) __builtin_prefetch(images + index[next] * inputs + k);
}

/* ReLU of the first layer, for the units from `first` to `last` -> hidden_units (n, hidden), which has room for ROWS
   more images. A tile of the images is in the first cache while the weights of all these units pass by. */
static void forward(const uint8_t *images, const int64_t *index, const float *weight, const float *bias, float *x,
                    uint8_t *panels, float *hidden_units, int n, int inputs, int hidden, int first, int last) {
    for (int b = 0; b < n; b += ROWS) {
        read_images(images, index, x, panels, b, n, inputs);
        for (int unit = first; unit < last; unit += COLUMNS) {
            wide sum[RESULTS * WIDE] = {{0}}, result[RESULTS];
            const float *w = weight + (size_t)unit * inputs;
            for (int k = 0; k < inputs; k += WIDE) {
                wide column[COLUMNS];
                UNROLL for (int j = 0; j < COLUMNS; j++) column[j] = held(at(w + (size_t)j * inputs + k));
                UNROLL for (int i = 0; i < ROWS; i++) {
                    wide row = held(at(x + (size_t)i * inputs + k));
                    UNROLL for (int j = 0; j < COLUMNS; j++) sum[i * COLUMNS + j] += row * column[j];
                }
            }
            UNROLL for (int i = 0; i < RESULTS; i++) result[i] = sums(sum + i * WIDE);
            UNROLL for (int i = 0; i < ROWS * COLUMNS; i++) {
                int to = unit + i % COLUMNS;
                float h = result[i / WIDE][i % WIDE] + bias[to];
                hidden_units[(size_t)(b + i / COLUMNS) * hidden + to] = h < 0 ? 0 : h; /* NaN stays */
            }
        }
    }
}

/* Hidden units (hidden) of an image, weight (CLASSES, hidden) and bias (CLASSES) -> logits (CLASSES). */
INLINE void classify(const float *h, const float *weight, const float *bias, float *logits, int hidden) {
    for (int c = 0; c < CLASSES; c += WIDE) {
        wide sum[WIDE] = {{0}};
        for (int unit = 0; unit < hidden; unit += WIDE)
            UNROLL for (int i = 0; i < WIDE; i++) sum[i] += at(h + unit) * at(weight + (c + i) * hidden + unit);
        put(logits + c, sums(sum) + at(bias + c));
    }
}

/* Logits of one of n images -> its loss in nats, and the gradient of the mean loss (CLASSES). */
INLINE float cross_entropy(const float *logits, int label, float *gradient, int classes, int n) {
    float most = logits[0], total = 0;
    for (int c = 1; c < classes; c++) most = logits[c] > most ? logits[c] : most;
    for (int c = 0; c < CLASSES; c += WIDE) put(gradient + c, power(at(logits + c) - most));
    for (int c = 0; c < classes; c++) total += gradient[c];
    for (int c = 0; c < CLASSES; c++) gradient[c] = c < classes ? gradient[c] / (total * n) : 0;
    gradient[label] -= 1.0f / n;
    return logf(total) + most - logits[label];
}

/* For WIDE units from `first` on: the gradients of their outputs before ReLU -> delta (n, WIDE); and those of their
   bias and of their columns of the second weight. `second` is a copy of that, since other threads still read it. */
static void backward(const struct adam *a, struct part part, const struct tensor *t, const float *error,
                     const float *hidden_units, const float *second, float *delta, int hidden, int first, int classes) {
    wide bias = before(part, t[1], first), sum[CLASSES];
    for (int c = 0; c < classes; c++) sum[c] = before(part, t[2], (size_t)c * hidden + first);
    for (int b = 0; b < part.size; b++) {
        wide units = at(hidden_units + (size_t)b * hidden + first), d = {0};
        UNROLL for (int c = 0; c < CLASSES; c++)
            if (c < classes) {
                d += error[b * CLASSES + c] * at(second + c * hidden + first);
                sum[c] += error[b * CLASSES + c] * units;
            }
        d = (wide)((wide_ints)d & ~(units <= 0));
        put(delta + (size_t)b * WIDE, d);
        bias += d;
    }
    use(a, part, t[1], first, bias);
    for (int c = 0; c < classes; c++) use(a, part, t[2], (size_t)c * hidden + first, sum[c]);
}

/* For UNITS rows of the first weight and `many` vectors of inputs, from `place` on: the gradient, and its use. */
INLINE void update(const struct adam *a, struct part part, struct tensor t, const float *x, const float *delta,
                   int inputs, size_t place, int many) {
    wide sum[UNITS][2];
    UNROLL for (int i = 0; i < UNITS * many; i++) {
        size_t soon = place + (size_t)(i / many) * inputs + i % many * WIDE;
        sum[i / many][i % many] = before(part, t, soon);
        __builtin_prefetch(t.weight + soon, 1), __builtin_prefetch(t.mean + soon, 1);
        __builtin_prefetch(t.square + soon, 1);
    }
    for (int b = 0; b < part.size; b++) {
        wide row[2];
        UNROLL for (int v = 0; v < many; v++) row[v] = held(at(x + b * PANEL + v * WIDE));
        UNROLL for (int u = 0; u < UNITS; u++) {
            wide d = held(all(delta[b * WIDE + u]));
            UNROLL for (int v = 0; v < many; v++) sum[u][v] += d * row[v];
        }
    }
    UNROLL for (int i = 0; i < UNITS * many; i++)
        use(a, part, t, place + (size_t)(i / many) * inputs + i % many * WIDE, sum[i / many][i % many]);
}

/* The same for all inputs of the units from `first` to `last`. x is room for a panel of the images, as floats. */
static void update_rows(const struct adam *a, struct part part, struct tensor t, const uint8_t *panels, float *x,
                        const float *delta, int inputs, int first, int last) {
    for (int k = 0; k < inputs; k += PANEL) {
        scale(panels + (size_t)k * PART, x, part.size * PANEL);
        for (int unit = first; unit < last; unit += UNITS) {
            const float *own = delta + (size_t)(unit - first) / WIDE * PART * WIDE + (unit - first) % WIDE;
            size_t place = (size_t)unit * inputs + k;
            if (k + PANEL <= inputs)
                update(a, part, t, x, own, inputs, place, 2);
            else
                update(a, part, t, x, own, inputs, place, 1);
        }
    }
}

/* The second layer, as every thread computes it: hidden units, weight, bias -> logits, unless they are missing, and
   error (n, CLASSES), the gradient of the mean loss of all images. `bias` becomes its own gradient.
   Returns the sum of the losses. */
static double answer(struct part part, const float *hidden_units, const float *second, float *bias,
                     const int64_t *labels, float *error, float *logits, int hidden, int classes) {
    float own[CLASSES], sum[CLASSES] = {0};
    double loss = 0;
    for (int b = 0; b < part.size; b++) {
        classify(hidden_units + (size_t)b * hidden, second, bias, own, hidden);
        if (logits) memcpy(logits + (size_t)b * classes, own, sizeof(float) * classes);
        loss += cross_entropy(own, (int)labels[b], error + b * CLASSES, classes, part.n);
        for (int c = 0; c < CLASSES; c++) sum[c] += error[b * CLASSES + c];
    }
    memcpy(bias, sum, sizeof sum);
    return loss;
}

/* Where, in floats from the beginning of a thread's own room, its things are: after x, which is a tile of the images
   forward and a panel of them backward, the panels of their bytes, the gradients of its hidden units, the errors and a
   copy of the second layer; and the size of all. `shared` is that of the hidden units, before the threads' rooms. */
struct layout {
    size_t shared, panels, delta, error, second, all;
};
static struct layout layout(int inputs, int hidden) {
    size_t whole = (size_t)(inputs + PANEL - 1) / PANEL * PANEL, tile = ROWS * whole, panel = PART * PANEL;
    struct layout own = {(size_t)(PART + ROWS) * hidden};
    own.panels = tile > panel ? tile : panel;
    own.delta = own.panels + PART * whole / sizeof(float);
    own.error = own.delta + (size_t)PART * hidden;
    own.second = own.error + PART * CLASSES;
    own.all = own.second + (size_t)CLASSES * (hidden + 1);
    return own;
}

/* How many floats the threads need as room: the hidden units, which they share, and each thread's own. */
size_t room(int inputs, int hidden, int threads) {
    const struct layout own = layout(inputs, hidden);
    return own.shared + threads * own.all;
}

/* Count a step of Adam for each of the tensors, and return what it needs. options: learning rate, beta1, beta2 and
   epsilon. */
static struct adam advance(const struct tensor *t, const double *options) {
    for (int i = 0; i < 4; i++) *t[i].steps += 1;
    double first = 1 - pow(options[1], *t->steps), second = 1 - pow(options[2], *t->steps);
    return (struct adam){(float)(options[0] / first), (float)(1 / sqrt(second)), (float)(1 - options[1]),
                         (float)(1 - options[2]), (float)options[3]};
}

/* images uint8 (any, inputs), index (n): which of them, labels (n): theirs, and the tensors: the weight and bias of
   both layers. Adam updates them, by options; without it, their gradients are left. -> loss, the mean in nats; logits
   (n, classes). inputs and hidden are multiples of WIDE, classes at most CLASSES. */
void mlp_step(const uint8_t *images, const int64_t *index, const int64_t *labels, const struct tensor *t,
              const double *options, float *given, float *loss, float *logits, int n, int inputs, int hidden,
              int classes, int threads) {
    const struct layout own = layout(inputs, hidden);
    const struct adam adam = options ? advance(t, options) : (struct adam){0}, *a = options ? &adam : 0;
    double total = 0;
#pragma omp parallel num_threads(threads)
    for (struct part part = {0, 0, n}; part.from < n; part.from += PART) {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads(), groups = hidden / WIDE;
        const int from = groups * thread / team * WIDE, to = groups * (thread + 1) / team * WIDE;
        float *x = given + own.shared + own.all * thread, *delta = x + own.delta;
        float *error = x + own.error, *second = x + own.second, *bias = second + CLASSES * hidden;
        uint8_t *panels = (uint8_t *)(x + own.panels);
        part.size = n - part.from < PART ? n - part.from : PART;
        memset(second, 0, sizeof(float) * CLASSES * (hidden + 1));
        memcpy(second, t[2].weight, sizeof(float) * classes * hidden);
        memcpy(bias, t[3].weight, sizeof(float) * classes);
        forward(images, index + part.from, t[0].weight, t[1].weight, x, panels, given, part.size, inputs, hidden, from,
                to);
#pragma omp barrier
        float *answers = thread ? 0 : logits + (size_t)part.from * classes;
        double sum = answer(part, given, second, bias, labels + part.from, error, answers, hidden, classes);
        if (!thread) {
            total += sum;
            use_few(a, part, t[3], bias, classes);
        }
        for (int first = from; first < to; first += WIDE)
            backward(a, part, t, error, given, second, delta + (size_t)PART * (first - from), hidden, first, classes);
        update_rows(a, part, t[0], panels, x, delta, inputs, from, to);
#pragma omp barrier
    }
    *loss = (float)(total / n);
}
