// What a sequence has cached, dense: cells to ELEMENT[PARTS][KV_HEADS][tokens][HEAD_DIM].
//
// `table`: slots of the sequence's blocks, from the block of the first token that is wanted on; nothing behind `tokens` is read.

extern "C" __global__ void gather(const u8 *cells, u64 slot_bytes, const u32 *table, u32 tokens, u8 *to) {
    u64 count = (u64)RUNS * tokens * RUN_UNITS;
    for (u64 at = blockIdx.x * (u64)blockDim.x + threadIdx.x; at < count; at += (u64)gridDim.x * blockDim.x) {
        u32 unit = at % RUN_UNITS, token = at / RUN_UNITS % tokens, run = at / RUN_UNITS / tokens;
        const Unit *source = (const Unit *)(cells + run_at(slot_bytes, table[token / BLOCK_TOKENS], run, token % BLOCK_TOKENS));
        ((Unit *)to)[at] = source[unit];
    }
}
