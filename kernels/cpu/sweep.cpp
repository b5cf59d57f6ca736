// See ../core/sweep.h. A tile of 16 rows lies transposed, so that rows, which are independent, fill the vectors.
// Columns go in strips: those of a strip make up for one another at once, those behind it once for the whole strip,
// in the order of its columns. Built with -ffp-contract=off: every product and difference is rounded by itself.
#include "../core/sweep.h"

#include "blocks.h"

using namespace surgery;

namespace {

constexpr int LANES = 16, STRIP = 8, ABREAST = 4;

typedef float Vector __attribute__((vector_size(4 * LANES)));

union Column {
    Vector all;
    float row[LANES];
};

struct Tile {
    Column value[MOST_COLS + ABREAST], error[MOST_COLS];
    int32_t gone[MOST_COLS][LANES];
    uint8_t code[MOST_COLS][LANES];
};

// The grid of one column for every row of the tile.
struct Points {
    alignas(64) float scale[LANES], low[LANES], high[LANES];
    int32_t zero[LANES];
};

struct Rows {
    int64_t batch, first;
    int count;

    // Rows past the last repeat it and are not stored.
    int64_t row(int lane) const { return first + (lane < count ? lane : count - 1); }
};

void load(const Sweep& job, const Rows& rows, Tile& tile) {
    for (int lane = 0; lane < LANES; ++lane) {
        const float* from = job.weights + rows.batch * job.weight_batch + rows.row(lane) * job.weight_row;
        for (int c = 0; c < job.cols; ++c) tile.value[c].row[lane] = from[c];
    }
    for (int c = job.cols; c < job.cols + ABREAST; ++c) tile.value[c].all = Vector{};
    if (!job.mask) {
        memset(tile.gone, 0, sizeof tile.gone);
        return;
    }
    for (int lane = 0; lane < LANES; ++lane) {
        const uint8_t* from = job.mask + rows.batch * job.mask_batch + rows.row(lane) * job.mask_row;
        for (int c = 0; c < job.cols; ++c) tile.gone[c][lane] = from[c] != 0;
    }
}

void store(const Sweep& job, const Rows& rows, const Tile& tile) {
    for (int lane = 0; lane < rows.count; ++lane) {
        const int64_t row = rows.first + lane;
        float* value = job.values + rows.batch * job.value_batch + row * job.value_row;
        float* error = job.errors + rows.batch * job.error_batch + row * job.error_row;
        for (int c = 0; c < job.cols; ++c) value[c] = tile.value[c].row[lane];
        for (int c = 0; c < job.cols; ++c) error[c] = tile.error[c].row[lane];
        if (!job.codes) continue;
        uint8_t* code = job.codes + rows.batch * job.code_batch + row * job.code_row;
        for (int c = 0; c < job.cols; ++c) code[c] = tile.code[c][lane];
    }
}

void load(const Sweep& job, const Rows& rows, int32_t group, Points& points) {
    for (int lane = 0; lane < LANES; ++lane) {
        const int64_t at = (rows.batch * job.rows + rows.row(lane)) * job.groups + group;
        points.scale[lane] = job.scales[at];
        points.zero[lane] = job.zeros[at];
        points.low[lane] = (float)(0 - points.zero[lane]);
        points.high[lane] = (float)(job.top - points.zero[lane]);
    }
}

// Which n of the m columns from `first` on are pruned: those with fewer than n before them.
void choose(const Sweep& job, const float* factor, int first, Tile& tile) {
    alignas(64) uint32_t key[MOST_PATTERN][LANES];
    alignas(64) int32_t before[MOST_PATTERN][LANES] = {};
    for (int i = 0; i < job.of; ++i) {
        const float diagonal = factor[(first + i) * job.factor_row + first + i];
        for (int lane = 0; lane < LANES; ++lane)
            key[i][lane] = saliency_key(tile.value[first + i].row[lane] / diagonal);
    }
    for (int i = 1; i < job.of; ++i)
        for (int j = 0; j < i; ++j)
            for (int lane = 0; lane < LANES; ++lane) {
                const int32_t later = key[i][lane] < key[j][lane];
                before[j][lane] += later;
                before[i][lane] += 1 - later;
            }
    for (int i = 0; i < job.of; ++i)
        for (int lane = 0; lane < LANES; ++lane) tile.gone[first + i][lane] = before[i][lane] < job.prune;
}

template <bool GRID>
inline __attribute__((always_inline)) void settle(Tile& tile, int c, float diagonal, const Points& points) {
    float* __restrict value = tile.value[c].row;
    float* __restrict error = tile.error[c].row;
    uint8_t* __restrict code = tile.code[c];
    const int32_t* gone = tile.gone[c];
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; ++lane) {
        const float w = value[lane];
        float q = w;
        if (GRID) {
            const float offset = grid_offset(w / points.scale[lane], points.low[lane], points.high[lane]);
            q = offset * points.scale[lane];
            code[lane] = grid_code(gone[lane] ? 0.0f : offset, points.low[lane]);
        }
        q = gone[lane] ? 0.0f : q;
        error[lane] = (w - q) / diagonal;
        value[lane] = q;
    }
}

// Columns `from` .. `to` make up for the errors of the columns first .. last.
void make_up(Tile& tile, const float* factor, int64_t stride, int first, int last, int from, int to) {
    for (int j = from; j < to; j += ABREAST) {
        Vector sum[ABREAST];
        for (int k = 0; k < ABREAST; ++k) sum[k] = tile.value[j + k].all;
        for (int c = first; c < last; ++c) {
            const float* across = factor + c * stride + j;
            for (int k = 0; k < ABREAST; ++k) sum[k] -= tile.error[c].all * (j + k < to ? across[k] : 0.0f);
        }
        for (int k = 0; k < ABREAST; ++k) tile.value[j + k].all = sum[k];
    }
}

template <bool GRID>
void sweep_rows(const Sweep& job, const Rows& rows, Tile& tile) {
    const float* factor = job.factor + rows.batch * job.factor_batch;
    const int32_t* group = GRID ? job.group + rows.batch * job.group_batch : nullptr;
    const int strip = job.of ? (job.of < STRIP ? STRIP / job.of * job.of : job.of) : STRIP;
    Points points;
    load(job, rows, tile);
    for (int first = 0; first < job.cols; first += strip) {
        const int last = first + strip < job.cols ? first + strip : job.cols;
        for (int c = first; c < last; ++c) {
            if (job.of && c % job.of == 0) choose(job, factor, c, tile);
            if (GRID && (c == 0 || group[c] != group[c - 1])) load(job, rows, group[c], points);
            const float* across = factor + c * job.factor_row;
            settle<GRID>(tile, c, across[c], points);
            for (int j = c + 1; j < last; ++j) tile.value[j].all -= tile.error[c].all * across[j];
        }
        make_up(tile, factor, job.factor_row, first, last, last, job.cols);
    }
    store(job, rows, tile);
}

}  // namespace

extern "C" void SURGERY_SWEEP(const Sweep* job, int64_t first, int64_t last) {
    const int64_t tiles = (job->rows + LANES - 1) / LANES;
    Tile* tile = new Tile;
    for (int64_t item = first; item < last; ++item) {
        const int64_t row = item % tiles * LANES, left = job->rows - row;
        const Rows rows = {item / tiles, row, (int)(left < LANES ? left : LANES)};
        if (job->scales)
            sweep_rows<true>(*job, rows, *tile);
        else
            sweep_rows<false>(*job, rows, *tile);
    }
    delete tile;
}
