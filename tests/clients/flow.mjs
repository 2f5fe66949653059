// What a program does with an official Node client and a served Penstock.
//
//     node flow.mjs PART FLAVOUR URL KEY INPUTS PACKAGE
//
// PACKAGE is the folder of the client. What it saw is printed as one JSON document, whose keys
// `flow.py` has as well; what is right is for the tests to say.

import { createReadStream } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const [part, flavour, url, key, inputs, folder] = process.argv.slice(2);
const { AzureOpenAI, OpenAI, APIError, toFile } = await import(
  pathToFileURL(join(folder, "index.mjs"))
);
const { version } = JSON.parse(await readFile(join(folder, "package.json"), "utf8"));

const CHAT = { endpoint: "/v1/chat/completions", completion_window: "24h" };
const FINAL = ["completed", "failed", "expired", "cancelled"];
const PATIENCE_MS = 20_000;
const LIFE_S = 7200;
const SOURCE = join(inputs, "requests.jsonl");

const exchanges = [];

async function noted(target, init) {
  const response = await fetch(target, init);
  exchanges.push({
    method: init.method.toUpperCase(),
    path: new URL(target).pathname,
    status: response.status,
    content_type: response.headers.get("content-type"),
    request_id: response.headers.get("x-request-id"),
    should_retry: response.headers.get("x-should-retry"),
  });
  return response;
}

function connect(apiKey) {
  if (flavour === "openai") {
    return new OpenAI({ baseURL: `${url}/v1`, apiKey, fetch: noted });
  }
  const deployment = flavour === "azure-deployment" ? "sim" : undefined;
  const apiVersion = "2025-04-01-preview";
  return new AzureOpenAI({ endpoint: url, deployment, apiVersion, apiKey, fetch: noted });
}

// How the client tells of an error, and how many requests it took.
async function refusal(call) {
  const before = exchanges.length;
  try {
    await call();
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    return {
      name: error.constructor.name,
      status: error.status,
      message: error.error?.message,
      type: error.type,
      param: error.param,
      code: error.code,
      request_id: error.requestID,
      requests: exchanges.length - before,
    };
  }
  return {};
}

async function idsOf(listing) {
  const ids = [];
  for await (const thing of listing) ids.push(thing.id);
  return ids;
}

async function textOf(client, fileId) {
  return (await client.files.content(fileId)).text();
}

async function wait(client, batchId, ...until) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const batch = await client.batches.retrieve(batchId);
    if (until.includes(batch.status)) return batch;
    if (Date.now() > deadline) throw new Error(`The batch is ${batch.status}.`);
    await sleep(50);
  }
}

async function runFiles(client) {
  const purpose = "batch";
  const expires_after = { anchor: "created_at", seconds: LIFE_S };
  const from_path = await client.files.create({
    file: await toFile(await readFile(SOURCE), "requests.jsonl"),
    purpose,
    expires_after,
  });
  const from_bytes = await client.files.create({
    file: await toFile(await readFile(SOURCE)),
    purpose,
  });
  const from_stream = await client.files.create({ file: createReadStream(SOURCE), purpose });
  return {
    from_path,
    from_bytes,
    from_stream,
    retrieved: await client.files.retrieve(from_path.id),
    waited: await client.files.waitForProcessing(from_path.id),
    content: await textOf(client, from_stream.id),
    listed: await idsOf(client.files.list({ purpose, order: "asc", limit: 2 })),
    deleted: await client.files.delete(from_bytes.id),
    after_delete: await refusal(() => client.files.retrieve(from_bytes.id)),
  };
}

async function runBatches(client) {
  const upload = async (name) =>
    (await client.files.create({ file: createReadStream(join(inputs, name)), purpose: "batch" }))
      .id;
  const input_file_id = await upload("requests.jsonl");
  const slow = await upload("held.jsonl");
  const create = (more) => client.batches.create({ input_file_id, ...CHAT, ...more });
  const named = await create({ metadata: { team: "search" } });
  const plain = await create({ metadata: null });
  const rest = [(await create()).id, (await create()).id];
  const held = await create({ input_file_id: slow });
  const completed = await wait(client, named.id, ...FINAL);
  await wait(client, held.id, "in_progress");
  const cancelling = await client.batches.cancel(held.id);
  return {
    made: [named.id, plain.id, ...rest, held.id],
    named,
    plain,
    completed,
    output: await textOf(client, completed.output_file_id),
    errors: await textOf(client, completed.error_file_id),
    listed: await idsOf(client.batches.list({ limit: 2 })),
    first_page: (await client.batches.list()).data.map((batch) => batch.id),
    cancelling,
    cancelled: await wait(client, held.id, ...FINAL),
    cancelled_again: await client.batches.cancel(held.id),
    cancel_of_completed: await refusal(() => client.batches.cancel(named.id)),
  };
}

async function runAll() {
  const client = connect(key);
  const bad = { ...CHAT, endpoint: "/v1/x", input_file_id: "file-1" };
  return {
    files: await runFiles(client),
    batches: await runBatches(client),
    refused: {
      unknown_batch: await refusal(() => client.batches.retrieve("batch_unknown")),
      unknown_file: await refusal(() => client.files.content("file-unknown")),
      wrong_endpoint: await refusal(() => client.batches.create(bad)),
      not_jsonl: await refusal(async () =>
        client.files.create({ file: await toFile(Buffer.from("no JSON\n")), purpose: "batch" }),
      ),
      wrong_key: await refusal(() => connect("sk-wrong-0123456789").batches.list()),
    },
  };
}

async function runUploads() {
  const client = connect(key);
  const data = await readFile(SOURCE);
  const half = data.length >> 1;
  const size = {
    bytes: data.length,
    filename: "parts.jsonl",
    mime_type: "application/jsonl",
    purpose: "batch",
  };
  const partOf = async (upload, piece) =>
    client.uploads.parts.create(upload.id, { data: await toFile(piece) });

  const created = await client.uploads.create({
    ...size,
    expires_after: { anchor: "created_at", seconds: LIFE_S },
  });
  const last = await partOf(created, data.subarray(half));
  const first = await partOf(created, data.subarray(0, half));
  const completed = await client.uploads.complete(created.id, { part_ids: [first.id, last.id] });
  const batch = await client.batches.create({ input_file_id: completed.file.id, ...CHAT });

  const short = await client.uploads.create(size);
  const piece = await partOf(short, data.subarray(0, half));
  const too_short = await refusal(() =>
    client.uploads.complete(short.id, { part_ids: [piece.id] }),
  );
  const cancelled = await client.uploads.cancel(short.id);
  return {
    created,
    part: first,
    completed,
    batch: await wait(client, batch.id, ...FINAL),
    content: await textOf(client, completed.file.id),
    cancelled,
    refused: {
      too_short,
      late_part: await refusal(() => partOf(short, Buffer.from("late"))),
      unknown: await refusal(() => client.uploads.cancel("upload_unknown")),
    },
  };
}

const run = { all: runAll, uploads: runUploads }[part];
const document = await run();
process.stdout.write(JSON.stringify({ version, ...document, exchanges }) + "\n");
