// exp and log in float64 from sums and products alone, each rounded by itself, so that every
// implementation of these lines has the same bits. Relative errors 1e-11 and 1e-10.
#pragma once
#include "bits.h"

namespace surgery {

static const double ROUNDER = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
static const double LN2_HIGH = 0.693147180369123816490, LN2_LOW = 1.90821492927058770002e-10;

SURGERY_FN uint64_t bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

SURGERY_FN double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

SURGERY_FN double exp_series(double r) {
    double sum = 1.0 / 362880;
    sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040;
    sum = sum * r + 1.0 / 720;
    sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24;
    sum = sum * r + 1.0 / 6;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    return sum * r + 1.0;
}

// e^x for x <= 0; below -700 it is e^-700. From SMALL on it is exp_series(x) to the last bit.
static const double SMALL = -0.34;

SURGERY_FN double exp_of_negative(double x) {
    x = x > -700.0 ? x : -700.0;
    const double rounded = x * 1.44269504088896338700 + ROUNDER;
    const double whole = rounded - ROUNDER;
    const double r = x - whole * LN2_HIGH - whole * LN2_LOW;
    return exp_series(r) * double_of((bits_of_double(rounded) - bits_of_double(ROUNDER) + 1023) << 52);
}

// ln((1 + s) / (1 - s)) for |s| up to 0.172.
SURGERY_FN double log_series(double s) {
    const double z = s * s;
    double sum = 1.0 / 11;
    sum = sum * z + 1.0 / 9;
    sum = sum * z + 1.0 / 7;
    sum = sum * z + 1.0 / 5;
    sum = sum * z + 1.0 / 3;
    sum = sum * z + 1.0;
    return (s + s) * sum;
}

// ln x for finite x > 0 that is no subnormal.
SURGERY_FN double log_of_positive(double x) {
    const int64_t bits = (int64_t)bits_of_double(x);
    const int64_t exponent = ((bits - 0x3FE6A09E667F3BCD) >> 32 >> 20);
    const double m = double_of((uint64_t)(bits - exponent * 0x10000000000000));
    const double whole = double_of((uint64_t)(exponent + (int64_t)bits_of_double(ROUNDER))) - ROUNDER;
    return whole * (LN2_HIGH + LN2_LOW) + log_series((m - 1.0) / (m + 1.0));
}

// Whether ln(p / q) is log_series((p - q) / (p + q)); elsewhere it is log_of_positive(p / q).
SURGERY_FN bool near_one(double gap, double sum) { return (gap < 0.0 ? -gap : gap) <= 0.17 * sum; }

// SFC64 (Chris Doty-Humphrey's PractRand, public domain), with NumPy's halves: the low 32 bits come first.
struct Sfc64 {
    uint64_t a, b, c, counter;

    SURGERY_MEMBER uint64_t next() {
        const uint64_t drawn = a + b + counter++;
        a = b ^ (b >> 11);
        b = c + (c << 3);
        c = ((c << 24) | (c >> 40)) + drawn;
        return drawn;
    }
};

// Uniform in [0, 1), 24 bits.
SURGERY_FN float uniform_of(uint32_t drawn) { return (float)(int32_t)(drawn >> 8) * (1.0f / 16777216.0f); }

}  // namespace surgery
