// New keys and values into the device's pool: dense to cells.
//
// `from`: rows of `row_bytes` bytes, one for each token of a step, each beginning with RUNS runs in a cell's order. `places`: for each
// token slot * BLOCK_TOKENS + offset. A thread copies units; which thread copies which changes nothing.

extern "C" __global__ void scatter(const u8 *from, u64 row_bytes, const u32 *places, u32 tokens, u8 *cells, u64 slot_bytes) {
    u64 count = (u64)tokens * RUNS * RUN_UNITS;
    for (u64 at = blockIdx.x * (u64)blockDim.x + threadIdx.x; at < count; at += (u64)gridDim.x * blockDim.x) {
        u32 unit = at % RUN_UNITS, run = at / RUN_UNITS % RUNS, token = at / RUN_UNITS / RUNS;
        u32 slot = places[token] / BLOCK_TOKENS, offset = places[token] % BLOCK_TOKENS;
        const Unit *source = (const Unit *)(from + token * row_bytes + (u64)run * RUN_BYTES);
        Unit *target = (Unit *)(cells + run_at(slot_bytes, slot, run, offset));
        target[unit] = source[unit];
    }
}
