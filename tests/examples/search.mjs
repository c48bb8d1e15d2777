// Any language: a socket, a line of JSON out, a line of JSON back. No package is needed.
// node search.mjs DATASET '[1, 0, 0]'       SYNCD_SOCKET is the socket of a running syncd.
import { connect } from "node:net";
import { createInterface } from "node:readline";

const socket = connect(process.env.SYNCD_SOCKET ?? "/var/lib/syncd/syncd.sock");
const [dataset, vector] = process.argv.slice(2);
const params = { dataset, vector: JSON.parse(vector), k: 2, consistency: "strong" };
socket.write(JSON.stringify({ jsonrpc: "2.0", id: 1, method: "search", params }) + "\n");

for await (const line of createInterface({ input: socket })) {
  const { result, error } = JSON.parse(line);
  if (error) throw new Error(`${error.message} (${error.data?.hint})`);
  result.keys.forEach((key, place) => console.log(key, result.distances[place]));
  break;
}
socket.end();
