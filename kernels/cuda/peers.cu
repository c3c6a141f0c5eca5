// Ranks of one host that write into each other's memory. Nothing waits for the host, and no size depends on what the
// data say, so a CUDA graph holds all of it.
//
// Each rank writes (pushes) what the others need into their memory, then stores a flag there: the number of the meeting,
// its epoch, which every rank counts for itself. Who finds all flags of an epoch reads its own memory. There is no
// barrier behind: a meeting's memory is written to again two epochs later, and by then everyone has stored the flag
// between, behind its reading. For that there are two halves, which take turns. Small sums do without flags
// (fold_at_once).
//
// Sums are the contract's: a binary tree over the ranks in their order (dsv3_plugin/ops/slices.py), whoever came first.

#include "peer_units.cuh"

// One rank's view. Rank r's memory begins at memory[r]; epochs are of this rank, one a CTA.
struct Peers {
    char* memory[RANKS];
    u32* epochs;
    int rank;
};

// Memory begins with the flags: of each CTA, one a rank.
__device__ __forceinline__ u32* flags_of(const Peers& peers, int owner) {
    return (u32*)peers.memory[owner] + blockIdx.x * RANKS;
}

// Returns once all ranks' CTAs of this number have come here. What they wrote before is there.
__device__ __forceinline__ void meet(const Peers& peers, u32 epoch) {
    __syncthreads();
    for (int r = threadIdx.x; r < RANKS; r += blockDim.x) store_release(flags_of(peers, r) + peers.rank, epoch);
    for (int r = threadIdx.x; r < RANKS; r += blockDim.x) {
        const u64 begin = nanoseconds();
        while ((int)(load_acquire(flags_of(peers, peers.rank) + r) - epoch) < 0)
            if (nanoseconds() - begin > PATIENCE_SECONDS * 1000000000ull) give_up();
    }
    __syncthreads();
}

__device__ __forceinline__ void remember(const Peers& peers, u32 epoch) {
    __syncthreads();
    if (threadIdx.x == 0) peers.epochs[blockIdx.x] = epoch;
}

// Reductions and gathers. CTAs take chunks of the words in turns. Behind the flags a CTA has, in each half, room for a
// chunk from each rank, which is CHUNK words at most.

template <class Word>
__device__ __forceinline__ Word* room(const Peers& peers, int owner, u32 epoch, int from) {
    const int half = blockIdx.x * 2 + epoch % 2;
    return (Word*)(peers.memory[owner] + ROOM_AT) + ((size_t)half * RANKS + from) * CHUNK;
}

// A thread's words of a chunk. They are read together, before the first of them is written: one wait for all of them.
template <class Word, int MOST_WORDS = CHUNK / THREADS>
struct Words {
    static constexpr int MOST = MOST_WORDS;
    Word word[MOST];

    __device__ __forceinline__ void load(const Word* from, int words) {
#pragma unroll
        for (int k = 0; k < MOST; k++)
            if (k * THREADS + threadIdx.x < words) word[k] = from[k * THREADS + threadIdx.x];
    }

    __device__ __forceinline__ void store(Word* to, int words) const {
#pragma unroll
        for (int k = 0; k < MOST; k++)
            if (k * THREADS + threadIdx.x < words) to[k * THREADS + threadIdx.x] = word[k];
    }

    // To who looks at them without a flag.
    __device__ __forceinline__ void push(Word* to, int words) const {
#pragma unroll
        for (int k = 0; k < MOST; k++)
            if (k * THREADS + threadIdx.x < words) store_relaxed(to + k * THREADS + threadIdx.x, word[k]);
    }
};

// Neighbours first, then neighbouring pairs.
__device__ __forceinline__ float4 tree_sum(float4 (&parts)[RANKS]) {
#pragma unroll
    for (int step = 1; step < RANKS; step *= 2)
#pragma unroll
        for (int r = 0; r + step < RANKS; r += 2 * step) {
            const float4 left = parts[r], right = parts[r + step];
            parts[r] = make_float4(__fadd_rn(left.x, right.x), __fadd_rn(left.y, right.y), __fadd_rn(left.z, right.z),
                                   __fadd_rn(left.w, right.w));
        }
    return parts[0];
}

// This rank's words to the sums of all ranks' words. Eight are waited for at once.
__device__ __forceinline__ void add_others(const Peers& peers, u32 epoch, Words<float4>& own, int words) {
    constexpr int MOST = Words<float4>::MOST, TOGETHER = RANKS < 8 && MOST % (8 / RANKS) == 0 ? 8 / RANKS : 1;
#pragma unroll
    for (int first = 0; first < MOST; first += TOGETHER) {
        float4 parts[TOGETHER][RANKS];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++)
#pragma unroll
            for (int r = 0; r < RANKS; r++) {
                const int i = (first + k) * THREADS + threadIdx.x;
                parts[k][r] = own.word[first + k];
                if (r != peers.rank && i < words) parts[k][r] = room<float4>(peers, peers.rank, epoch, r)[i];
            }
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) own.word[first + k] = tree_sum(parts[k]);
    }
}

// x fp32 of each rank to the sum of all: every rank gets all of x from every other, and adds by itself. For two ranks:
// with more it sends more than fold_shares.
extern "C" __global__ void __launch_bounds__(THREADS)
fold_all(const __grid_constant__ Peers peers, const float4* x, float4* out, int words, int chunk) {
    u32 epoch = peers.epochs[blockIdx.x];
    Words<float4> own;
    for (int first = blockIdx.x * chunk; first < words; first += gridDim.x * chunk) {
        epoch++;
        const int count = min(chunk, words - first);
        own.load(x + first, count);
        for (int p = 1; p < RANKS; p++)
            own.store(room<float4>(peers, (peers.rank + p) % RANKS, epoch, peers.rank), count);
        meet(peers, epoch);
        add_others(peers, epoch, own, count);
        own.store(out + first, count);
    }
    remember(peers, epoch);
}

// The same with fewer bytes on the way and a second meeting: a rank adds a share of each chunk, and sends its sums.
extern "C" __global__ void __launch_bounds__(THREADS)
fold_shares(const __grid_constant__ Peers peers, const float4* x, float4* out, int words, int chunk) {
    u32 epoch = peers.epochs[blockIdx.x];
    Words<float4> share;
    for (int first = blockIdx.x * chunk; first < words; first += gridDim.x * chunk) {
        epoch++;
        const int count = min(chunk, words - first), most = (count + RANKS - 1) / RANKS;
        const auto words_of = [=](int r) { return max(0, min(most, count - r * most)); };
        for (int p = 1; p < RANKS; p++) {
            const int r = (peers.rank + p) % RANKS;
            share.load(x + first + r * most, words_of(r));
            share.store(room<float4>(peers, r, epoch, peers.rank), words_of(r));
        }
        share.load(x + first + peers.rank * most, words_of(peers.rank));
        meet(peers, epoch);
        add_others(peers, epoch, share, words_of(peers.rank));
        share.store(out + first + peers.rank * most, words_of(peers.rank));
        epoch++;
        for (int p = 1; p < RANKS; p++)
            share.store(room<float4>(peers, (peers.rank + p) % RANKS, epoch, peers.rank), words_of(peers.rank));
        meet(peers, epoch);
        for (int p = 1; p < RANKS; p++) {
            const int r = (peers.rank + p) % RANKS;
            share.load(room<float4>(peers, peers.rank, epoch, r), words_of(r));
            share.store(out + first + r * most, words_of(r));
        }
    }
    remember(peers, epoch);
}

// Small sums, with neither flags nor fences: a word itself says that it has come. Where none has come lies NOTHING, a
// NaN that no arithmetic makes and that nobody sends. Who waits for a word looks at each of its numbers, since they may
// come one by one, and puts NOTHING back in its place.
//
// Each CTA has two rooms, which take turns from one of its calls to the next. Nobody writes to a room that is not yet
// empty: a rank empties it before its kernel ends; behind that begins the kernel of the CTA's next call, which sends
// words to all; who has got those writes to the room in a later kernel still. Kernels' order stands for fences, so a
// kernel fills a room once: a thread holds all of its words (AT_ONCE). A third room would be needed if a call left its
// room to the next one to empty, which does not know how full it is.

constexpr u32 NOTHING = 0xFFFFFFFF, NAN_OF_SUMS = 0x7FFFFFFF;

__device__ __forceinline__ bool is_nothing(float x) { return __float_as_uint(x) == NOTHING; }

__device__ __forceinline__ bool lacks_a_number(const float4& word) {
    return is_nothing(word.x) || is_nothing(word.y) || is_nothing(word.z) || is_nothing(word.w);
}

// The card makes this NaN of whatever NaN it adds, so no bit of a sum changes.
__device__ __forceinline__ float sendable(float x) { return is_nothing(x) ? __uint_as_float(NAN_OF_SUMS) : x; }

__device__ __forceinline__ float4* room_at_once(const Peers& peers, int owner, u32 call, int from) {
    const int room = blockIdx.x * 2 + call % 2;
    return (float4*)(peers.memory[owner] + AT_ONCE_AT) + ((size_t)room * RANKS + from) * THREADS * AT_ONCE;
}

// This rank's words to the sums of all ranks' words, as these come.
__device__ __forceinline__ void add_as_they_come(
    const Peers& peers, u32 call, Words<float4, AT_ONCE>& own, int words) {
    float4* const room = room_at_once(peers, peers.rank, call, 0) + threadIdx.x;
    const auto place = [=](int k, int r) { return room + (r * AT_ONCE + k) * THREADS; };
    const auto comes = [&](int k, int r) { return r != peers.rank && k * THREADS + threadIdx.x < words; };
    const float none = __uint_as_float(NOTHING);
    const float4 nothing = make_float4(none, none, none, none);
    float4 parts[AT_ONCE][RANKS];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
        for (int r = 0; r < RANKS; r++) parts[k][r] = comes(k, r) ? nothing : own.word[k];
    const u64 begin = nanoseconds();
    bool complete;
    do {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
            for (int r = 0; r < RANKS; r++)
                if (lacks_a_number(parts[k][r])) parts[k][r] = load_relaxed(place(k, r));
        const bool late = nanoseconds() - begin > PATIENCE_SECONDS * 1000000000ull;  // while they are being read
        complete = true;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
            for (int r = 0; r < RANKS; r++) complete = complete && !lacks_a_number(parts[k][r]);
        if (!complete && late) give_up();
    } while (!complete);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (comes(k, r)) store_relaxed(place(k, r), nothing);
        own.word[k] = tree_sum(parts[k]);
    }
}

// x fp32 of each rank to the sum of all, of chunks that a CTA has room for. `epochs` count the calls of this kernel.
extern "C" __global__ void __launch_bounds__(THREADS)
fold_at_once(const __grid_constant__ Peers peers, const float4* x, float4* out, int words, int chunk) {
    const u32 call = peers.epochs[blockIdx.x];
    const int first = blockIdx.x * chunk, count = min(chunk, words - first);
    Words<float4, AT_ONCE> own = {};
    own.load(x + first, count);
#pragma unroll
    for (float4& word : own.word)
        word = make_float4(sendable(word.x), sendable(word.y), sendable(word.z), sendable(word.w));
    for (int p = 1; p < RANKS; p++) own.push(room_at_once(peers, (peers.rank + p) % RANKS, call, peers.rank), count);
    add_as_they_come(peers, call, own, count);
    own.store(out + first, count);
    remember(peers, call + 1);
}

// x of each rank to those of all, in the order of ranks: out has RANKS times as many words.
extern "C" __global__ void __launch_bounds__(THREADS)
gather(const __grid_constant__ Peers peers, const uint4* x, uint4* out, int words, int chunk) {
    u32 epoch = peers.epochs[blockIdx.x];
    Words<uint4> chunk_of_rank;
    for (int first = blockIdx.x * chunk; first < words; first += gridDim.x * chunk) {
        epoch++;
        const int count = min(chunk, words - first);
        chunk_of_rank.load(x + first, count);
        for (int p = 1; p < RANKS; p++)
            chunk_of_rank.store(room<uint4>(peers, (peers.rank + p) % RANKS, epoch, peers.rank), count);
        chunk_of_rank.store(out + (size_t)peers.rank * words + first, count);
        meet(peers, epoch);
        for (int p = 1; p < RANKS; p++) {
            const int r = (peers.rank + p) % RANKS;
            chunk_of_rank.load(room<uint4>(peers, peers.rank, epoch, r), count);
            chunk_of_rank.store(out + (size_t)r * words + first, count);
        }
    }
    remember(peers, epoch);
}

// Rows that go to the ranks of their experts, and back. Experts lie in slots, as many on each rank. A rank's rows are
// sorted by slot; at a slot's owner they lie by slot, and within a slot by the rank they came from. So the numbers of
// rows that each rank sends to each slot say of every segment, the rows of one rank for one slot, where it lies at both
// ends.
//
// Three meetings of one CTA: behind the counts, behind the rows, behind the rows that came back. Each is behind the
// reading of what the next layer writes, so there are no halves.

// Behind the flags: rows of each rank for each slot.
__device__ __forceinline__ u32* counts_of(const Peers& peers, int owner) {
    return (u32*)(peers.memory[owner] + COUNTS_AT);
}

// How many rows this rank sends to each of `slots`, to all ranks; of each own slot, how many come from all.
extern "C" __global__ void __launch_bounds__(THREADS)
exchange_counts(const __grid_constant__ Peers peers, const long long* counts, long long* own_counts, int slots) {
    const u32 epoch = peers.epochs[0] + 1;
    for (int r = 0; r < RANKS; r++) {
        u32* to = counts_of(peers, r) + peers.rank * slots;
        for (int i = threadIdx.x; i < slots; i += blockDim.x) to[i] = (u32)counts[i];
    }
    meet(peers, epoch);
    const int held = slots / RANKS;
    const u32* all = counts_of(peers, peers.rank) + peers.rank * held;
    for (int i = threadIdx.x; i < held; i += blockDim.x) {
        long long sum = 0;
        for (int r = 0; r < RANKS; r++) sum += all[r * slots + i];
        own_counts[i] = sum;
    }
    remember(peers, epoch);
}

// Rows of `row_words` words to their slots' owners, or from there to where they came from (`back`); in the memory that
// they get to they begin at word `target`. PARTS CTAs carry a segment.
extern "C" __global__ void __launch_bounds__(THREADS)
move_rows(const __grid_constant__ Peers peers, const uint4* rows, int slots, int row_words, int target, int back) {
    const int held = slots / RANKS, segment = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
    const int source = back ? segment % RANKS : peers.rank;
    const int slot = back ? peers.rank * held + segment / RANKS : segment;
    const int owner = slot / held;
    const u32* counts = counts_of(peers, peers.rank);
    const int count = counts[source * slots + slot];
    if (count == 0) return;
    int before = 0;  // of the source's rows
    for (int i = threadIdx.x; i < slot; i += blockDim.x) before += counts[source * slots + i];
    int above = 0;  // of the owner's rows
    for (int r = 0; r < RANKS; r++) {
        const int end = r < source ? slot + 1 : slot;
        for (int i = owner * held + threadIdx.x; i < end; i += blockDim.x) above += counts[r * slots + i];
    }
    before = block_sum(before);
    above = block_sum(above);
    const uint4* from = rows + (size_t)(back ? above : before) * row_words;
    uint4* to = (uint4*)peers.memory[back ? source : owner] + target + (size_t)(back ? before : above) * row_words;
    const size_t words = (size_t)count * row_words;
    for (size_t i = part * blockDim.x + threadIdx.x; i < words; i += PARTS * blockDim.x) to[i] = from[i];
}

// All ranks have come here: what they moved is there.
extern "C" __global__ void arrive(const __grid_constant__ Peers peers) {
    const u32 epoch = peers.epochs[0] + 1;
    meet(peers, epoch);
    remember(peers, epoch);
}
