// A server with four worker threads that use files, pipes, timers and connections to it.
'use strict';
const { Worker, isMainThread, threadId } = require('worker_threads');
const fs = require('fs');
const http = require('http');
const { spawn } = require('child_process');

const PORT = 3000;

if (isMainThread) {
  const server = http.createServer((request, response) => response.end('hello\n'));
  server.listen(PORT, '127.0.0.1', () => {
    for (let i = 0; i < 4; i++) new Worker(__filename);
    console.log('listening');
  });
} else {
  work(new http.Agent({ keepAlive: true, maxSockets: 4 }));
}

function get(agent) {
  return new Promise((done, failed) => {
    const options = { host: '127.0.0.1', port: PORT, agent };
    http.get(options, (response) => response.resume().on('end', done)).on('error', failed);
  });
}

function run() {
  return new Promise((done, failed) => spawn('/bin/true').on('exit', done).on('error', failed));
}

async function work(agent) {
  const path = `/tmp/worker.${threadId}`;
  for (let round = 0; ; round++) {
    const file = await fs.promises.open(path, 'w');
    await file.write('some text');
    await Promise.all([get(agent), get(agent), get(agent)]);
    await file.close();
    await fs.promises.unlink(path);
    if (round % 20 === 0) await run();
    await new Promise((done) => setTimeout(done, 5));
  }
}
