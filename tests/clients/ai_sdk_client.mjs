// The AI SDK with both of its OpenAI providers: BASE_URL KEY MODEL.
import assert from "node:assert/strict";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, streamText, tool } from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [base, key, MODEL] = process.argv.slice(2);
const baseURL = `${base}/v1`;
const compatible = createOpenAICompatible({ name: "keepwarm", baseURL, apiKey: key });
const openai = createOpenAI({ baseURL, apiKey: key });
const providers = {
  "openai-compatible": (name) => compatible(name),
  openai: (name) => openai.chat(name),
};
const QUESTION = "Name a river and the sea that it ends in.";
const SYSTEM = "You are terse.";
const LENGTH = { maxOutputTokens: 12, temperature: 0, maxRetries: 0 };

const checks = {
  async chat(model) {
    const reply = await generateText({ model, instructions: SYSTEM, prompt: QUESTION, ...LENGTH });
    assert.ok(reply.text);
    assert.ok(["stop", "length"].includes(reply.finishReason));
    assert.ok(reply.usage.inputTokens > 0 && reply.usage.outputTokens > 0);
    return JSON.stringify(reply.text);
  },

  async streamedChatIsTheSameChat(model) {
    const asked = { model, instructions: SYSTEM, prompt: QUESTION, ...LENGTH };
    const whole = await generateText(asked);
    const stream = streamText({ ...asked, onError: ({ error }) => assert.fail(error) });
    const parts = [];
    for await (const part of stream.textStream) parts.push(part);
    assert.equal(parts.join(""), whole.text);
    assert.equal(await stream.finishReason, whole.finishReason);
    const usage = await stream.usage;
    assert.equal(usage.inputTokens, whole.usage.inputTokens);
    assert.equal(usage.outputTokens, whole.usage.outputTokens);
    return `${parts.length} parts, ${usage.inputTokens} and ${usage.outputTokens} tokens`;
  },

  async secondTurnFindsAllOfTheFirst(model, label) {
    const messages = [{ role: "user", content: `${QUESTION} (${label})` }];
    const first = await generateText({ model, instructions: SYSTEM, messages, ...LENGTH });
    const again = { role: "user", content: "And another?" };
    const next = [...messages, ...first.response.messages, again];
    const second = await generateText({ model, instructions: SYSTEM, messages: next, ...LENGTH });
    const held = first.usage.inputTokens + first.usage.outputTokens - 1;
    const cached = second.usage.inputTokenDetails.cacheReadTokens;
    assert.ok(cached >= held && held > 0, `${cached} cached, ${held} held`);
    return `${cached} of ${second.usage.inputTokens} tokens cached`;
  },

  async toolIsOfferedAndTextComesBack(model) {
    const inputSchema = jsonSchema({ type: "object", properties: { river: { type: "string" } } });
    const tools = { lengthOf: tool({ description: "Length of a river", inputSchema }) };
    const reply = await generateText({ model, tools, prompt: QUESTION, ...LENGTH });
    assert.ok(reply.text);
  },

  async maxTokensAndStopEndAReply(model) {
    const asked = { model, prompt: QUESTION, ...LENGTH, maxOutputTokens: 6 };
    const long = await generateText(asked);
    assert.equal(long.finishReason, "length");
    const middle = Math.floor(long.text.length / 2);
    const stop = long.text.slice(middle, middle + 2);
    const stopped = await generateText({ ...asked, stopSequences: [stop] });
    assert.equal(stopped.finishReason, "stop");
    assert.equal(stopped.text, long.text.slice(0, long.text.indexOf(stop)));
    return JSON.stringify(stop);
  },

  async unknownModelIsNotFound(_, label) {
    const model = providers[label]("no-such-model");
    const failed = await generateText({ model, prompt: QUESTION, ...LENGTH }).catch((e) => e);
    assert.ok(APICallError.isInstance(failed), String(failed));
    assert.equal(failed.statusCode, 404);
    assert.match(failed.message, /no-such-model/);
    return failed.message;
  },
};

let numFailed = 0;
for (const [label, provider] of Object.entries(providers)) {
  for (const [name, check] of Object.entries(checks)) {
    try {
      const shown = await check(provider(MODEL), label);
      console.log(`  ok   ${label} ${name}${shown === undefined ? "" : `: ${shown}`}`);
    } catch (error) {
      numFailed += 1;
      console.log(`  FAIL ${label} ${name}\n${error.stack}`);
    }
  }
}
const listed = await fetch(`${baseURL}/models`, { headers: { Authorization: `Bearer ${key}` } });
assert.deepEqual((await listed.json()).data.map((card) => card.id), [MODEL]);
process.exitCode = numFailed ? 1 : 0;
