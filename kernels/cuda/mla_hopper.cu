// Absorbed attention over V3's latent (512 + 64) on Hopper's asynchronous units.
//
// A thread block takes 64 rows (token, head) of one request and walks keys in blocks of 64, which lie in two stages.
// Two warpgroups own a stage each: they copy its keys through the tensor memory accelerator and compute scores and
// probabilities. Two hold 256 columns of the output each and add every block to them. Nobody waits for anybody but
// through the barriers of a stage, so copies, products and exponentials of neighbouring blocks overlap.
//
// Splits are folded in their order. Where there are more tiles of rows than multiprocessors a thread block takes all
// splits of a tile, one after the other, and keeps the folded prefix in scratch memory of its own. Else every split is
// a thread block's work of its own and `fold` puts them together. Both are the same operations, hence the same bits.
//
// A stage's rotary keys are read by the scores alone, so the probabilities, of the same shape, are written there.
//
// Every product and sum of the contract is an intrinsic that rounds once and is never contracted.

#include "mla_units.cuh"

constexpr int ROWS = 64;
constexpr int KEYS = 64;
constexpr int RANK = 512;
constexpr int HALF = RANK / 2;
constexpr int TILES = 9;
constexpr int PART = 3;  // tiles of one copy, and that one barrier waits for
constexpr int PARTS = TILES / PART;
constexpr int HALF_TILES = 4;
constexpr int BLOCK_BYTES = TILES * TILE;
constexpr int SCORE_REGISTERS = 72;
constexpr int VALUE_REGISTERS = 184;

struct Batch {
    const void* block_table;
    const void* seq_lens;
    const void* query_start_loc;
    long long table_stride;
    int table_wide, lens_wide, starts_wide;  // 64-bit integers
    int requests;
    int heads;
    int block_size;
    int box_rows;    // keys of one copy: the largest power of two that divides block_size, 64 at most
    float scale;     // of scores, in units of log 2
    u16* out;        // bf16 [tokens * heads, 512]
    float* prefixes; // fp32 [thread blocks, 64 * 512], what a tile's earlier splits folded to
    float* parts;    // fp32 [capacity, 64, 512], outputs of splits that `fold` puts together
    float2* stats;   // fp32 [capacity, 64], their maxima and sums
    int capacity;
    int* apart;  // set where splits are stored for `fold`
};

// One piece of work: rows of one tile and a range of their keys.
struct Work {
    int q_row;           // first row in q and out
    int rows;            // 0: no work is left
    int first_position;  // of the request's first query
    int tile_row;        // rows of the request before this tile
    int key_begin, key_end;
    int slot;            // where the split is stored; -1: the output is written
    int visible;         // keys that some row of the tile sees
    int request;
};

// Where in the batch the search for works stands.
struct Works {
    bool apart;   // every split is a work of its own
    int number;   // of the work that comes next
    int first;    // of the 32 requests looked at
    int before;   // works before them
};

struct Shared {
    alignas(1024) char q[BLOCK_BYTES];
    alignas(1024) char keys[2][BLOCK_BYTES];
    float alpha[2][ROWS], maximum[2][ROWS], total[2][ROWS];
    Work work[2];
    Works works;
    u64 q_full, q_empty;
    u64 work_full[2], work_empty[2];
    u64 full[2][PARTS];
    u64 empty[2][2];  // a half of the columns each
    u64 scaled[2];    // alpha and maximum
    u64 ready[2][2];  // probabilities of 32 keys each
    u64 totalled[2];  // total
};

// p * 2**n; n is x rounded to an integer, in the lowest bits of `shifted`. 0 where x is below -125 or NaN.
__device__ __forceinline__ float times_power(float p, float shifted, float x) {
    const float scaled = __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
    return x >= -125.0f ? scaled : 0.0f;
}

// 2**x of x <= 0: `elementary.exp2_of_nonpositive`. NaN gives 0, which is what rows that have seen no key need.
__device__ __forceinline__ float exp2_of_nonpositive(float x) {
    const float shifted = __fadd_rn(x, 12582912.0f);
    const float f = __fsub_rn(x, __fsub_rn(shifted, 12582912.0f));
    float p = __fmaf_rn(EXP2_5, f, EXP2_4);
    p = __fmaf_rn(p, f, EXP2_3);
    p = __fmaf_rn(p, f, EXP2_2);
    p = __fmaf_rn(p, f, EXP2_1);
    p = __fmaf_rn(p, f, 1.0f);
    return times_power(p, shifted, x);
}

// Probabilities are bf16, so the hardware's 2**x, of a fifth of the instructions, mostly gives them. This says whether
// some of those looked at may be others: where bf16 of `near_exp2(x)` and of `exp2_of_nonpositive(x)` differ, the first
// is at most NEAR fp32 numbers from the middle between two bf16 numbers. Below 2**-125 the contract has 0, and for NaN.
struct Doubt {
    static constexpr u32 MIDDLE = 0x8000;               // in the half of an fp32 number that rounding drops
    static constexpr u32 LEAST = 0x0100, ONE = 0x3F80;  // 2**-125 and 1 in bf16
    u32 nearest = ~0u;  // pair of the least distances from the lower border of what is near
    u32 farthest = 0;   // pair of the largest distances above LEAST; what is not above it wraps around

    // Two powers and what they round to.
    __device__ __forceinline__ void consider(float low, float high, u32 pair) {
        const u32 lower_halves = __byte_perm(__float_as_int(low), __float_as_int(high), 0x5410);
        nearest = min_pair(nearest, add_pair(lower_halves, (MIDDLE + NEAR) * 0x10001u));
        farthest = max_pair(farthest, add_pair(pair, (0xFFFF - LEAST) * 0x10001u));
    }

    __device__ __forceinline__ bool any() const {
        return min(nearest & 0xFFFF, nearest >> 16) <= 2 * NEAR ||
               max(farthest & 0xFFFF, farthest >> 16) > ONE - LEAST - 1;
    }
};

// The same of differences of maxima, multiples of MAXIMUM_STEP: the polynomial is 1.
__device__ __forceinline__ float power_of_two(float x) {
    return times_power(1.0f, __fadd_rn(x, 12582912.0f), x);
}

// x * y, rounded up to a multiple of MAXIMUM_STEP, a power of two.
__device__ __forceinline__ float step_above(float x, float y) {
    return MAXIMUM_STEP * ceilf(__fmul_ru(x, y) * (1.0f / MAXIMUM_STEP));
}

__device__ __forceinline__ long long integer(const void* array, int wide, long long index) {
    return wide ? ((const long long*)array)[index] : (long long)((const int*)array)[index];
}

// What of a request's lengths every schedule needs; lane i of a warp looks at request `first + i`.
struct Lane {
    int start, queries, length, tiles, splits;
};

__device__ __forceinline__ Lane look_at(const Batch& batch, int request) {
    Lane lane = {0, 0, 0, 0, 0};
    if (request < batch.requests) {
        lane.start = (int)integer(batch.query_start_loc, batch.starts_wide, request);
        lane.queries = (int)integer(batch.query_start_loc, batch.starts_wide, request + 1) - lane.start;
        lane.length = (int)integer(batch.seq_lens, batch.lens_wide, request);
        lane.tiles = (lane.queries * batch.heads + ROWS - 1) / ROWS;
        lane.splits = (lane.length + SPLIT_KEYS - 1) / SPLIT_KEYS;
    }
    return lane;
}

// Whether every split is work of its own: where that keeps the card busy for a shorter time, and there is room.
__device__ bool splits_apart(const Batch& batch, int lane, int processors) {
    if (batch.capacity == 0) return false;
    int tiles = 0, works = 0, longest = 0;
    for (int first = 0; first < batch.requests; first += 32) {
        const Lane own = look_at(batch, first + lane);
        tiles += own.tiles;
        works += min(own.tiles * own.splits, 1 << 20);
        longest = max(longest, own.splits);
    }
    tiles = __reduce_add_sync(~0u, tiles);
    works = __reduce_add_sync(~0u, works);
    longest = __reduce_max_sync(~0u, longest);
    const int together = (tiles + processors - 1) / processors * longest;
    const int apart = (works + processors - 1) / processors;
    return works <= batch.capacity && apart * 5 < together * 4;
}

// Finds the next work of this thread block, by a whole warp.
__device__ __forceinline__ Work find_work(const Batch& batch, Works& works, int lane) {
    Work work = {};
    int before = works.before;
    const int number = works.number;
    for (int first = works.first; first < batch.requests; first += 32) {
        const Lane own = look_at(batch, first + lane);
        const int count = own.tiles * (works.apart ? own.splits : 1);
        int through = count;
        for (int i = 1; i < 32; i *= 2) {
            const int other = __shfl_up_sync(~0u, through, i);
            if (lane >= i) through += other;
        }
        const u32 behind = __ballot_sync(~0u, number < before + through);
        if (behind) {
            const int source = __ffs(behind) - 1;
            const int start = __shfl_sync(~0u, own.start, source), queries = __shfl_sync(~0u, own.queries, source);
            const int length = __shfl_sync(~0u, own.length, source), tiles = __shfl_sync(~0u, own.tiles, source);
            const int local = number - before - __shfl_sync(~0u, through - count, source);
            const int tile = works.apart ? local % tiles : local, split = works.apart ? local / tiles : 0;
            work.tile_row = tile * ROWS;
            work.q_row = start * batch.heads + work.tile_row;
            work.rows = min(queries * batch.heads - work.tile_row, ROWS);
            work.first_position = length - queries;
            work.visible = work.first_position + (work.tile_row + work.rows - 1) / batch.heads + 1;
            work.key_begin = split * SPLIT_KEYS;
            work.key_end = works.apart ? min(work.visible, work.key_begin + SPLIT_KEYS) : work.visible;
            work.slot = works.apart && work.visible > SPLIT_KEYS ? number : -1;
            work.request = first + source;
            __syncwarp();
            if (lane == 0) {
                works.number = number + gridDim.x;
                works.first = first;
                works.before = before;
            }
            __syncwarp();
            return work;
        }
        before += __shfl_sync(~0u, through, 31);
    }
    return work;
}

// Starts the copies of a stage's keys, by one warp.
struct Copies {
    const TensorMap* map;
    const Batch& batch;
    const Work& work;
    int page;  // of the block that comes next, looked up early

    // Keys behind the last one are taken from its page.
    __device__ __forceinline__ int page_of(int key) const {
        const int number = min(key, work.visible - 1) / batch.block_size;
        return (int)integer(batch.block_table, batch.table_wide, work.request * batch.table_stride + number);
    }

    __device__ __forceinline__ void start(Shared& shared, int begin, int next, int stage, int parity, int lane) {
        char* keys = shared.keys[stage];
        u64* full = shared.full[stage];
        const int row = begin % batch.block_size;
        if (batch.box_rows == KEYS) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                // The first part lies in the first half of the columns, the second in both, the last one in the second.
                if (part < 2) barrier_wait(&shared.empty[stage][part], parity);
                if (elect()) {
                    barrier_expect(&full[part], PART * TILE);
                    copy_keys(keys + part * PART * TILE, map, &full[part], row, part * PART, page);
                }
            }
            page = page_of(next);
            return;
        }
        for (int half = 0; half < 2; half++) barrier_wait(&shared.empty[stage][half], parity);
        if (lane < PARTS) barrier_expect(&full[lane], PART * TILE);
        __syncwarp();
        for (int box = lane; box < KEYS / batch.box_rows; box += 32) {
            const int key = begin + box * batch.box_rows;
            const int box_page = page_of(key), box_row = key % batch.block_size;
            for (int tile = 0; tile < TILES; tile++)
                copy_keys(keys + tile * TILE + box * batch.box_rows * 128, map, &full[tile / PART], box_row, tile,
                          box_page);
        }
    }
};

// Scores of one block: K ascends over the tiles, each used as soon as it is there.
__device__ __forceinline__ void start_scores(Shared& shared, float (&scores)[32], int stage, int parity) {
    const u64 q = operand(shared.q), keys = operand(shared.keys[stage]);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if (tile % PART == 0) {
            barrier_wait(&shared.full[stage][tile / PART], parity);
            wgmma_begin();
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int step = (tile * TILE + k * 32) >> 4;
            multiply_scores(scores, q + step, keys + step, tile + k > 0);
        }
    }
    wgmma_end();
}

// The sum of a row's 64 probabilities by halves; this thread has columns 8 i + 2 (lane % 4) and the one behind as the
// row's pair i.
__device__ __forceinline__ float fold_sum(const u32 (&pairs)[16], int row) {
    float sum[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const auto at = [&](int i) {
            const u32 pair = pairs[2 * i + row];
            return __int_as_float(j == 0 ? pair << 16 : pair & 0xFFFF0000);
        };
        const float even = __fadd_rn(__fadd_rn(at(0), at(4)), __fadd_rn(at(2), at(6)));
        const float odd = __fadd_rn(__fadd_rn(at(1), at(5)), __fadd_rn(at(3), at(7)));
        sum[j] = __fadd_rn(even, odd);
        sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(~0u, sum[j], 2));
        sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(~0u, sum[j], 1));
    }
    return __fadd_rn(sum[0], sum[1]);
}

// The blocks of one stage, every second one: copies, scores, probabilities.
template <int STAGE>
__device__ __forceinline__ void compute_probabilities(
    Shared& shared, const Batch& batch, const TensorMap* q_map, const TensorMap* key_map, int thread) {
    const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
    const int row = warp * 16 + lane / 4;
    const float infinity = __int_as_float(0x7f800000);
    const bool scout = STAGE == 0 && warp == 0;
    if (scout) {
        const bool apart = splits_apart(batch, lane, gridDim.x);
        if (lane == 0) shared.works = {apart, (int)blockIdx.x, 0, 0};
        if (lane == 0 && blockIdx.x == 0 && batch.capacity > 0) *batch.apart = apart;
        __syncwarp();
    }
    int block = 0;
    for (int turn = 0;; ++turn) {
        if (scout) {
            Work next;
            do next = find_work(batch, shared.works, lane);
            while (next.rows > 0 && next.key_begin >= next.key_end);
            barrier_wait(&shared.work_empty[turn & 1], (turn >> 1 & 1) ^ 1);
            if (lane == 0) shared.work[turn & 1] = next;
            arrive_warp(&shared.work_full[turn & 1], lane);
            barrier_wait(&shared.q_empty, (turn & 1) ^ 1);
            if (next.rows > 0 && elect()) {
                barrier_expect(&shared.q_full, BLOCK_BYTES);
                for (int i = 0; i < TILES; i += PART) copy_q(shared.q + i * TILE, q_map, &shared.q_full, next.q_row, i);
            }
        }
        barrier_wait(&shared.work_full[turn & 1], turn >> 1 & 1);
        const Work& work = shared.work[turn & 1];
        if (work.rows == 0) return;
        const int blocks = (work.key_end - work.key_begin + KEYS - 1) / KEYS;
        int begin = work.key_begin + ((STAGE ^ block) & 1) * KEYS;
        int own = block + ((STAGE ^ block) & 1);
        block += blocks;
        Copies copies = {key_map, batch, work, 0};
        if (warp == 0 && begin < work.key_end) copies.page = copies.page_of(begin);
        // Rows behind the last one see what the last one sees; nobody stores them.
        int position[2];
        for (int i = 0; i < 2; i++)
            position[i] = work.first_position + (work.tile_row + min(row + 8 * i, work.rows - 1)) / batch.heads;
        const int lowest = work.first_position + work.tile_row / batch.heads;
        for (; begin < work.key_end; begin += 2 * KEYS, own += 2) {
            const int parity = own >> 1 & 1, parity_before = (own - 1) >> 1 & 1;
            const bool first = begin % SPLIT_KEYS == 0;
            if (warp == 0) copies.start(shared, begin, begin + 2 * KEYS, STAGE, parity ^ 1, lane);
            barrier_wait(&shared.q_full, turn & 1);
            float scores[32];
            start_scores(shared, scores, STAGE, parity);
            // The block before is the other warpgroup's; its maxima are read while the tensor core works.
            if (own > 0) barrier_wait(&shared.scaled[STAGE ^ 1], parity_before);
            float before[2], maximum[2], alpha[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                before[r] = first ? -infinity : shared.maximum[STAGE ^ 1][row + 8 * r];
                maximum[r] = before[r];
                alpha[r] = 1.0f;
            }
            wgmma_wait(0);
            if (begin + KEYS > lowest + 1) {
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const int key = begin + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (key > position[i / 2 % 2]) scores[i] = -infinity;
                }
            }
            float largest[2];
            bool grows = false;  // most blocks leave all maxima as they are; then no lane asks another
#pragma unroll
            for (int r = 0; r < 2; r++) {
                largest[r] = scores[2 * r];
#pragma unroll
                for (int i = 0; i < 8; i++)
                    largest[r] = fmaxf(largest[r], fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
                grows |= __fmul_ru(largest[r], batch.scale) > before[r];
            }
            if (__any_sync(~0u, grows)) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 1));
                    largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 2));
                    maximum[r] = fmaxf(step_above(largest[r], batch.scale), before[r]);
                    alpha[r] = power_of_two(__fsub_rn(before[r], maximum[r]));
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (lane % 4 == 0) {
                    shared.alpha[STAGE][row + 8 * r] = alpha[r];
                    shared.maximum[STAGE][row + 8 * r] = maximum[r];
                }
            }
            // The outputs are scaled while the probabilities are computed.
            arrive_warp(&shared.scaled[STAGE], lane);
            const int to_row = warp * 16 + lane % 16;
            char* to = shared.keys[STAGE] + 8 * TILE + to_row * 128;
            const auto exponent = [&](int i) { return __fmaf_rn(scores[i], batch.scale, -maximum[i / 2 % 2]); };
            u32 pairs[16];  // of probabilities
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Doubt doubt;
#pragma unroll
                for (int i = 8 * half; i < 8 * half + 8; i++) {
                    const float low = near_exp2(exponent(2 * i)), high = near_exp2(exponent(2 * i + 1));
                    pairs[i] = pack_bf16(low, high);
                    doubt.consider(low, high, pairs[i]);
                }
                if (doubt.any()) {
#pragma unroll
                    for (int i = 8 * half; i < 8 * half + 8; i++) {
                        const float low = exp2_of_nonpositive(exponent(2 * i));
                        pairs[i] = pack_bf16(low, exp2_of_nonpositive(exponent(2 * i + 1)));
                    }
                }
                // The rotary tile is overwritten: all warps must have read it.
                if (half == 0) warpgroup_sync(STAGE);
#pragma unroll
                for (int i = 4 * half; i < 4 * half + 4; i += 2) {
                    const u32* p = pairs + 2 * i;
                    store_matrices(shared_address(to + ((i + lane / 16) ^ (to_row % 8)) * 16), p[0], p[1], p[2], p[3]);
                }
                if (half == 0 && begin + KEYS > work.visible) {
                    // What lies behind the last key may be NaN, and 0 times NaN is NaN.
                    for (int i = thread; i < (begin + KEYS - work.visible) * 64; i += 128) {
                        const int at = i / 64 + work.visible - begin, part = i % 64;
                        *(uint4*)(shared.keys[STAGE] + part / 8 * TILE + at * 128 + part % 8 * 16) =
                            make_uint4(0, 0, 0, 0);
                    }
                    publish_to_units();
                }
                arrive_warp(&shared.ready[STAGE][half], lane);
            }
            if (own > 0) barrier_wait(&shared.totalled[STAGE ^ 1], parity_before);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float total_before = first ? 0.0f : shared.total[STAGE ^ 1][row + 8 * r];
                const float total = __fadd_rn(__fmul_rn(total_before, alpha[r]), fold_sum(pairs, r));
                if (lane % 4 == 0) shared.total[STAGE][row + 8 * r] = total;
            }
            arrive_warp(&shared.totalled[STAGE], lane);
        }
        arrive_warp(&shared.q_empty, lane);
        arrive_warp(&shared.work_empty[turn & 1], lane);
    }
}

// Factors of a fold: (maximum, sum, output) triples a and b become one, b behind a.
struct Fold {
    float maximum, a, b;

    __device__ __forceinline__ float operator()(float x, float y) const {
        return __fadd_rn(__fmul_rn(x, a), __fmul_rn(y, b));
    }
};

__device__ __forceinline__ Fold fold_of(float maximum_a, float maximum_b) {
    const float maximum = fmaxf(maximum_a, maximum_b);
    return {maximum, power_of_two(__fsub_rn(maximum_a, maximum)), power_of_two(__fsub_rn(maximum_b, maximum))};
}

// The rows of a thread at the end of a split: 8 apart, of each the columns 8 i + 2 (lane % 4) and the one behind.
struct Rows {
    int left;  // rows of the tile from the first one on
    float maximum[2], total[2];
    float prefix_maximum[2], prefix_total[2];
    bool sees[2];      // anything of the split; a row that does not keeps its prefix
    float a[2], b[2];  // factors of the fold with the prefix
};

// Loads of the prefix before the first number is stored. Each store then frees registers for two more.
constexpr int LOADS = 4;

// Give numbers 4 i to 4 i + 3 of `left` and then `right`, folded with the prefix where there is one, to `store`.
template <bool FOLDED, class Store>
__device__ __forceinline__ void finish_split(
    const float (&left)[64], const float (&right)[64], const float4* prefix, const Rows& rows, Store store) {
    float4 before[32];
    if (FOLDED) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) before[i] = load_prefix(prefix + i * 128);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float* at = i < 16 ? left + 4 * i : right + 4 * (i - 16);
        float4 x = make_float4(at[0], at[1], at[2], at[3]);
        if (FOLDED) {
            const auto fold = [&](int r, float old, float now) {
                const float both = __fadd_rn(__fmul_rn(old, rows.a[r]), __fmul_rn(now, rows.b[r]));
                return rows.sees[r] ? both : old;
            };
            x.x = fold(0, before[i].x, x.x);
            x.y = fold(0, before[i].y, x.y);
            x.z = fold(1, before[i].z, x.z);
            x.w = fold(1, before[i].w, x.w);
        }
        store(i, x);
        if (FOLDED) {
#pragma unroll
            for (int j = LOADS + 2 * i; j < LOADS + 2 * i + 2; j++)
                if (j < 32) before[j] = load_prefix(prefix + j * 128);
        }
    }
}

template <bool FOLDED>
__device__ __forceinline__ void keep_prefix(
    const float (&left)[64], const float (&right)[64], float4* prefix, const Rows& rows) {
    finish_split<FOLDED>(left, right, prefix, rows, [&](int i, float4 x) { store_prefix(prefix + i * 128, x); });
}

// Lanes 2 j and 2 j + 1 have numbers of columns a and columns b: now the even one has all of a, and the odd one of b.
template <class T>
__device__ __forceinline__ void exchange(T& a, T& b) {
    const bool odd = threadIdx.x % 2;
    const T other = __shfl_xor_sync(~0u, odd ? a : b, 1);
    (odd ? a : b) = other;
}

template <bool FOLDED>
__device__ __forceinline__ void store_output(
    const float (&left)[64], const float (&right)[64], const float4* prefix, const Rows& rows, u16* out) {
    const float over[2] = {__frcp_rn(rows.total[0]), __frcp_rn(rows.total[1])};
    u32 pairs[2][2];
    finish_split<FOLDED>(left, right, prefix, rows, [&](int i, float4 x) {
        pairs[0][i % 2] = pack_bf16(__fmul_rn(x.x, over[0]), __fmul_rn(x.y, over[0]));
        pairs[1][i % 2] = pack_bf16(__fmul_rn(x.z, over[1]), __fmul_rn(x.w, over[1]));
        if (i % 2 == 0) return;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            exchange(pairs[r][0], pairs[r][1]);
            u16* to = out + 8 * r * RANK + 8 * (i - 1);
            if (rows.left > 8 * r) *(uint2*)to = make_uint2(pairs[r][0], pairs[r][1]);
        }
    });
}

__device__ __forceinline__ void store_part(
    const float (&left)[64], const float (&right)[64], const Rows& rows, float* part) {
    float4 before;
    finish_split<false>(left, right, nullptr, rows, [&](int i, float4 x) {
        if (i % 2 == 0) {
            before = x;
            return;
        }
        exchange(before.x, x.x);
        exchange(before.y, x.y);
        exchange(before.z, x.z);
        exchange(before.w, x.w);
        float* to = part + 8 * (i - 1);
        if (rows.left > 0) *(float4*)to = make_float4(before.x, before.y, x.x, x.y);
        if (rows.left > 8) *(float4*)(to + 8 * RANK) = make_float4(before.z, before.w, x.z, x.w);
    });
}

__device__ __forceinline__ void accumulate_values(Shared& shared, const Batch& batch, int half, int thread) {
    const int lane = thread % 32, warp = thread / 32;
    const int row = warp * 16 + lane / 4, p_row = warp * 16 + lane % 16;
    float4* prefix = (float4*)batch.prefixes + (size_t)(blockIdx.x * 2 + half) * 32 * 128 + thread;
    int block = 0;
    for (int turn = 0;; ++turn) {
        barrier_wait(&shared.work_full[turn & 1], turn >> 1 & 1);
        const Work& work = shared.work[turn & 1];
        if (work.rows == 0) return;
        Rows rows;
        rows.left = work.rows - row;
        const bool used = warp * 16 < work.rows;  // nobody stores what the other warps compute
        const int column = half * HALF + lane % 2 * 8 + lane % 4 / 2 * 4;  // of what a thread stores
        for (int split = work.key_begin; split < work.key_end; split += SPLIT_KEYS) {
            float left[64], right[64];  // columns of the half, 128 each
            // Not for the sums, which start at zero anyway: it ends the life of the numbers before.
#pragma unroll
            for (int i = 0; i < 64; i++) left[i] = right[i] = 0.0f;
            const int end = min(split + SPLIT_KEYS, work.key_end);
            for (int begin = split; begin < end; begin += KEYS, ++block) {
                const int stage = block & 1, parity = block >> 1 & 1;
                barrier_wait(&shared.scaled[stage], parity);
                const float alpha[2] = {shared.alpha[stage][row], shared.alpha[stage][row + 8]};
                // A factor of one changes nothing.
                if (begin != split && __any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
                    for (int i = 0; i < 64; i++) {
                        left[i] = __fmul_rn(left[i], alpha[i / 2 % 2]);
                        right[i] = __fmul_rn(right[i], alpha[i / 2 % 2]);
                    }
                }
                barrier_wait(&shared.full[stage][half], parity);
                barrier_wait(&shared.full[stage][half + 1], parity);
                const char* p = shared.keys[stage] + 8 * TILE + p_row * 128;
                const u64 values = operand(shared.keys[stage] + half * HALF_TILES * TILE);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    u32 of_keys[2][4];
                    barrier_wait(&shared.ready[stage][pair], parity);
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        load_matrices(of_keys[i], p + ((4 * pair + 2 * i + lane / 16) ^ (p_row % 8)) * 16);
                    wgmma_begin();
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const u64 keys = values + ((2 * pair + i) * 2048 >> 4);
                        multiply_values(left, of_keys[i], keys, begin != split || pair + i > 0);
                        multiply_values(right, of_keys[i], keys + (2 * TILE >> 4), begin != split || pair + i > 0);
                    }
                }
                wgmma_end();
                if (begin + KEYS >= end) {
                    barrier_wait(&shared.totalled[stage], parity);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        rows.maximum[r] = shared.maximum[stage][row + 8 * r];
                        rows.total[r] = shared.total[stage][row + 8 * r];
                    }
                }
                // The next copy overwrites the probabilities.
                publish_to_units();
                wgmma_wait(0);
                arrive_warp(&shared.empty[stage][half], lane);
            }
            if (!used) continue;
            if (work.slot >= 0) {
                // `fold` takes it from here.
                float* part = batch.parts + ((size_t)work.slot * ROWS + row) * RANK + column;
                store_part(left, right, rows, part);
                if (half == 0 && lane % 4 == 0) {
                    float2* stats = batch.stats + (size_t)work.slot * ROWS + row;
                    stats[0] = make_float2(rows.maximum[0], rows.total[0]);
                    stats[8] = make_float2(rows.maximum[1], rows.total[1]);
                }
                break;
            }
            if (split == 0 && end == work.key_end) {
                u16* out = batch.out + (size_t)(work.q_row + row) * RANK + column;
                store_output<false>(left, right, prefix, rows, out);
                break;
            }
            if (split == 0) {
                keep_prefix<false>(left, right, prefix, rows);
            } else {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int at = min(row + 8 * r, work.rows - 1);
                    rows.sees[r] = split <= work.first_position + (work.tile_row + at) / batch.heads;
                    const Fold fold = fold_of(rows.prefix_maximum[r], rows.maximum[r]);
                    rows.a[r] = fold.a;
                    rows.b[r] = fold.b;
                    rows.maximum[r] = fold.maximum;
                    rows.total[r] = rows.sees[r] ? fold(rows.prefix_total[r], rows.total[r]) : rows.prefix_total[r];
                }
                if (end < work.key_end) {
                    keep_prefix<true>(left, right, prefix, rows);
                } else {
                    u16* out = batch.out + (size_t)(work.q_row + row) * RANK + column;
                    store_output<true>(left, right, prefix, rows, out);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                rows.prefix_maximum[r] = rows.maximum[r];
                rows.prefix_total[r] = rows.total[r];
            }
        }
        arrive_warp(&shared.work_empty[turn & 1], lane);
    }
}

extern "C" __global__ void __launch_bounds__(512, 1)
attend(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap key_map,
       const __grid_constant__ Batch batch) {
    extern __shared__ char memory[];
    Shared& shared = *(Shared*)(memory + (1024 - shared_address(memory) % 1024) % 1024);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        prefetch_map(&q_map);
        prefetch_map(&key_map);
        barrier_init(&shared.q_full, 1);
        barrier_init(&shared.q_empty, 8);
        for (int stage = 0; stage < 2; stage++) {
            barrier_init(&shared.work_full[stage], 1);
            barrier_init(&shared.work_empty[stage], 16);
            barrier_init(&shared.scaled[stage], 4);
            barrier_init(&shared.totalled[stage], 4);
            for (int i = 0; i < PARTS; i++) barrier_init(&shared.full[stage][i], 1);
            for (int i = 0; i < 2; i++) {
                barrier_init(&shared.empty[stage][i], 4);
                barrier_init(&shared.ready[stage][i], 4);
            }
        }
        barrier_init_fence();
        publish_to_units();
    }
    __syncthreads();
    wait_for_kernel_before();
    let_next_kernel_start();
    if (group < 2) {
        take_registers<VALUE_REGISTERS>();
        accumulate_values(shared, batch, group, thread);
    } else if (group == 2) {
        give_registers<SCORE_REGISTERS>();
        compute_probabilities<0>(shared, batch, &q_map, &key_map, thread);
    } else {
        give_registers<SCORE_REGISTERS>();
        compute_probabilities<1>(shared, batch, &q_map, &key_map, thread);
    }
}

// Put the stored splits of rows (token, head) together, in their order. They come to `groups` stages of shared memory,
// GROUP_SPLITS of them each: as many are on their way as there is room for. A thread reads what it has copied itself.
extern "C" __global__ void __launch_bounds__(128)
fold(const __grid_constant__ Batch batch, int all_rows, int groups) {
    extern __shared__ char memory[];
    float4* parts = (float4*)memory + threadIdx.x;  // [groups, GROUP_SPLITS, 128 threads]
    const int lane = threadIdx.x % 32, column = threadIdx.x * 4;
    let_next_kernel_start();
    wait_for_kernel_before();
    const bool apart = *batch.apart;
    for (int row = blockIdx.x; row < all_rows; row += gridDim.x) {
        int before = 0;  // works before this request's
        for (int first = 0; first < batch.requests; first += 32) {
            const Lane request = look_at(batch, first + lane);
            if (!apart) return;  // behind the loads of the lengths: none waits for the other
            const int count = request.tiles * request.splits;
            const u32 mine = __ballot_sync(
                ~0u, row >= request.start * batch.heads && row < (request.start + request.queries) * batch.heads);
            const int source = mine ? __ffs(mine) - 1 : 32;
            before += __reduce_add_sync(~0u, lane < source ? count : 0);
            if (!mine) continue;
            const int start = __shfl_sync(~0u, request.start, source);
            const int queries = __shfl_sync(~0u, request.queries, source);
            const int length = __shfl_sync(~0u, request.length, source);
            const int tiles = __shfl_sync(~0u, request.tiles, source);
            const int local = row - start * batch.heads, tile = local / ROWS;
            const int last = min(tile * ROWS + ROWS, queries * batch.heads) - 1;
            // A tile that sees one split only has its output already.
            if (length - queries + last / batch.heads < SPLIT_KEYS) break;
            const int splits = (length - queries + local / batch.heads) / SPLIT_KEYS + 1;
            const int slot = before + tile, at = local % ROWS;
            const auto part_of = [&](int split) { return (size_t)(slot + split * tiles) * ROWS + at; };
            const auto stats_of = [&](int split) { return batch.stats[part_of(min(split, splits - 1))]; };
            float2 next_stats = stats_of(lane);
            const auto copy_group = [&](int number, int stage) {
#pragma unroll
                for (int i = 0; i < GROUP_SPLITS; i++) {
                    const int split = number * GROUP_SPLITS + i;
                    if (split >= splits) continue;
                    copy_number(&parts[(stage * GROUP_SPLITS + i) * 128], batch.parts + part_of(split) * RANK + column);
                }
                end_group();
            };
            for (int i = 0; i < groups; i++) copy_group(i, i);
            int stage = 0;
            float highest = __int_as_float(0xff800000), total = 0.0f;  // -infinity
            float4 output;
            for (int behind = 0; behind < splits; behind += 32) {
                // Lane i has the factors of split `behind + i`. Maxima have no order, so they need no chain.
                const float2 own_stats = next_stats;
                next_stats = stats_of(behind + 32 + lane);
                float maximum = own_stats.x;
                for (int i = 1; i < 32; i *= 2) {
                    const float other = __shfl_up_sync(~0u, maximum, i);
                    if (lane >= i) maximum = fmaxf(maximum, other);
                }
                const float lane_before = __shfl_up_sync(~0u, maximum, 1);
                const Fold own = fold_of(lane == 0 ? highest : fmaxf(highest, lane_before), own_stats.x);
                highest = __shfl_sync(~0u, own.maximum, 31);
                const int end = min(splits, behind + 32);
                for (int first = behind; first < end; first += GROUP_SPLITS) {
                    wait_for_groups_but(groups - 1);
                    float4 next[GROUP_SPLITS];  // behind the last split, what nobody looks at
#pragma unroll
                    for (int i = 0; i < GROUP_SPLITS; i++) next[i] = parts[(stage * GROUP_SPLITS + i) * 128];
#pragma unroll
                    for (int i = 0; i < GROUP_SPLITS; i++) {
                        const int source = first + i - behind;
                        const float next_total = __shfl_sync(~0u, own_stats.y, source);
                        const Fold fold = {0.0f, __shfl_sync(~0u, own.a, source), __shfl_sync(~0u, own.b, source)};
                        if (first + i >= end) continue;
                        const bool alone = first == 0 && i == 0;  // the first split is taken as it is
                        total = alone ? next_total : fold(total, next_total);
                        output.x = alone ? next[i].x : fold(output.x, next[i].x);
                        output.y = alone ? next[i].y : fold(output.y, next[i].y);
                        output.z = alone ? next[i].z : fold(output.z, next[i].z);
                        output.w = alone ? next[i].w : fold(output.w, next[i].w);
                    }
                    copy_group(first / GROUP_SPLITS + groups, stage);
                    if (++stage == groups) stage = 0;
                }
            }
            const float over = __frcp_rn(total);
            *(uint2*)(batch.out + (size_t)row * RANK + column) =
                make_uint2(pack_bf16(__fmul_rn(output.x, over), __fmul_rn(output.y, over)),
                           pack_bf16(__fmul_rn(output.z, over), __fmul_rn(output.w, over)));
            break;
        }
    }
}
