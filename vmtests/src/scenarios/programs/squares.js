// Counts requests; four worker threads in turn square the count.
'use strict';
const { Worker, isMainThread, parentPort } = require('worker_threads');
const http = require('http');

if (isMainThread) {
  const waiting = new Map();
  const workers = [];
  for (let i = 0; i < 4; i++) {
    const worker = new Worker(__filename);
    worker.on('message', ([count, square]) => {
      waiting.get(count).end(`${count} ${square}\n`);
      waiting.delete(count);
    });
    workers.push(worker);
  }
  let count = 0;
  const server = http.createServer((request, response) => {
    count++;
    waiting.set(count, response);
    workers[count % workers.length].postMessage(count);
  });
  server.keepAliveTimeout = 0;
  server.listen(3000, '127.0.0.1', () => console.log('listening'));
} else {
  parentPort.on('message', (count) => parentPort.postMessage([count, count * count]));
}
