// The kernel of attention by heads as a function of a CPU (head_units.cuh of this folder).

#include "head_hopper.cu"

extern "C" void emulate_attend_heads(
    int blocks, const TensorMap* q, const TensorMap* key, const TensorMap* rope, const TensorMap* value,
    const Heads* heads) {
    launch(blocks, 384, [&] { attend_heads(*q, *key, *rope, *value, *heads); });
    // Nobody waits for a turn that was given.
    for (const Turn& turn : turns)
        if (turn.come != 0) abort();
}
