// Log-probabilities by node-llama-cpp: the base, and one context for each GGUF adapter.
//     node by_node.mjs DIRECTORY ARCHITECTURE

import {readFileSync} from "node:fs";
import {join} from "node:path";
import {getLlama} from "node-llama-cpp";

const folder = join(process.argv[2], process.argv[3]);
const expected = JSON.parse(readFileSync(join(folder, "expected.json"), "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", progressLogs: false});
const rows = {};
for (const name of Object.keys(expected.log_probs)) {
    const model = await llama.loadModel({modelPath: join(folder, "base.gguf")});
    const lora = name === "base" ? undefined : join(folder, "gguf", `${name}.gguf`);
    const types = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
    const context = await model.createContext({contextSize: 64, threads: 1, flashAttention: false, lora, ...types});
    const sequence = context.getSequence();
    rows[name] = [];
    for (const tokens of expected.prompts) {
        await sequence.clearHistory();
        const last = [tokens.at(-1), {generateNext: {probabilities: true}}];
        const found = await sequence.controlledEvaluate([...tokens.slice(0, -1), last]);
        const probabilities = found.at(-1).next.probabilities;
        rows[name].push([...probabilities.keys()].sort((a, b) => a - b).map((id) => Math.log(probabilities.get(id))));
    }
    await model.dispose();
}
console.log(JSON.stringify({log_probs: rows}));
await llama.dispose();
