// Searches by Node's pg: node searches.cjs PORT KEY, with PGPASSWORD. It prints JSON.
const { Client } = require("pg");

const [port, key] = process.argv.slice(2);
const connection = { host: "127.0.0.1", port, user: "any", database: "any" };

async function outcome(promise) {
  return promise.then(() => "ok", ({ code, detail }) => [code, detail]);
}

async function main() {
  const client = new Client(connection);
  await client.connect();
  const near = { name: "near", text: "SELECT key, distance FROM search_key($1, $2, k => $3)" };
  for (let time = 0; time < 3; time++) near.rows = await client.query({ ...near, values: ["chunks", key, 4] });
  const simple = await client.query("SELECT key FROM search('chunks', '[1, 0, 0]', 2); SELECT 1 AS one").then(
    () => "ok", ({ code, hint }) => [code, hint.length > 0]);
  const filtered = await client.query("SELECT key FROM search_key('chunks', $1, filter => $2)", [key, { lang: "de" }]);
  await client.query("BEGIN");
  const unknown = await outcome(client.query("SELECT * FROM search('nope', '[1]')"));
  const aborted = await outcome(client.query("SELECT * FROM datasets()"));
  await client.query("ROLLBACK");
  const datasets = await client.query("SELECT dataset, count, verified FROM datasets() WHERE true").then(
    () => "ok", ({ code }) => code);
  const counted = await client.query("SELECT dataset, count FROM datasets() LIMIT 1");
  await client.end();
  const stranger = await outcome(new Client({ ...connection, password: "wrong" }).connect());
  console.log(JSON.stringify({
    keys: near.rows.rows.map((row) => row.key),
    isNumber: typeof near.rows.rows[0].distance === "number",
    filtered: filtered.rows.map((row) => row.key),
    simple, unknown, aborted, datasets, counted: counted.rows, stranger,
  }));
}

main();
