// AWQ's GEMM form to values, see AwqWords in ../core/packed.h. Built with -ffp-contract=off.
#include "../core/packed.h"

#include "blocks.h"
#include "convert.h"

using namespace surgery;

namespace {

// A tile of so many words of so many columns: a whole line of each column is read at once, and rows are written in
// runs. Turned round, a word's columns fill vectors and its fields are its eight rows.
constexpr int WORDS = 16, COLS = 256;

void tile(const AwqWords& job, int64_t word, int words, int64_t start, int64_t end) {
    alignas(64) uint32_t turned[WORDS][COLS];
    const int64_t across = job.rows / 8;
    for (int64_t c = start; c < end; ++c)
        for (int w = 0; w < words; ++w) turned[w][c - start] = job.words[c * across + word + w];
    for (int w = 0; w < words; ++w)
        for (int field = 0; field < 8; ++field) {
            const int64_t row = (word + w) * 8 + awq_row(field);
            for (int64_t c = start; c < end;) {
                const int64_t group = c / job.width, stop = (group + 1) * job.width < end ? (group + 1) * job.width : end;
                const float scale = fp16_to_float(job.scales[group * job.rows + row]);
                const int32_t zero = job.zeros[group * across + word + w] >> 4 * field & 15;
                const uint32_t* from = turned[w] + (c - start);
                convert(job.out, job.kind, row * job.cols + c, (int)(stop - c),
                        [=](int i) { return on_grid(from[i] >> 4 * field & 15, zero, scale); });
                c = stop;
            }
        }
}

}  // namespace

// Words first .. last of every column.
extern "C" void SURGERY_AWQ(const AwqWords* job, int64_t first, int64_t last) {
    for (int64_t word = first; word < last; word += WORDS) {
        const int words = (int)(last - word < WORDS ? last - word : WORDS);
        for (int64_t start = 0; start < job->cols; start += COLS)
            tile(*job, word, words, start, start + COLS < job->cols ? start + COLS : job->cols);
    }
}
