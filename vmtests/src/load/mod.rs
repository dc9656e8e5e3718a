//! Clients of redis and memcached that notice everything.
//!
//! Each client has one connection and one thread. It writes and reads all the
//! time, remembers every acknowledged write, checks every answer and measures
//! the time between answers. The end of a connection, or no answer at all, is
//! a loss; a late answer is none.

mod protocol;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

pub use protocol::Connection;
pub use protocol::Protocol;

/// Keys of one client, written round and round.
const SLOTS: u64 = 100;

/// Pause after each answer: the guest is emulated, and a queue of requests
/// would only measure that.
const THINK: Duration = Duration::from_millis(20);

/// A server's port on the loopback device and how many clients it gets.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// What it speaks.
    pub protocol: Protocol,
    /// Where it listens.
    pub port: u16,
    /// Clients.
    pub clients: usize,
}

/// Clients at work.
#[derive(Debug)]
pub struct Load {
    clients: Vec<Client>,
    stop: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Client {
    name: String,
    shared: Arc<Shared>,
    thread: JoinHandle<Outcome>,
}

/// What a client shows while it runs.
#[derive(Debug, Default)]
struct Shared {
    answers: AtomicU64,
    /// Longest time between two answers, in microseconds.
    gap: AtomicU64,
    /// Why the connection is lost.
    lost: Mutex<Option<String>>,
}

/// What a client has at its end.
#[derive(Debug, Default)]
struct Outcome {
    acknowledged: u64,
    wrong: Vec<String>,
    missing: Vec<String>,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Connections at the beginning.
    pub connections: usize,
    /// Those lost, each with its reason.
    pub lost: Vec<String>,
    /// Requests answered.
    pub answers: u64,
    /// Writes acknowledged.
    pub acknowledged: u64,
    /// Answers that were wrong.
    pub wrong: Vec<String>,
    /// Acknowledged writes that were gone or changed at the end.
    pub missing: Vec<String>,
    /// Longest time between two answers on one connection.
    pub longest_gap: Duration,
}

impl Summary {
    /// True if nobody lost anything.
    pub fn clean(&self) -> bool {
        self.lost.is_empty() && self.wrong.is_empty() && self.missing.is_empty()
    }
}

impl Load {
    /// Connects all clients and lets them work.
    ///
    /// # Errors
    /// If one of them cannot connect.
    pub fn start(targets: &[Target]) -> Result<Load> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut connections = Vec::new();
        for target in targets {
            for number in 0..target.clients {
                let name = format!("{:?}-{number}", target.protocol).to_lowercase();
                connections.push((name, Connection::open(target.protocol, target.port)?));
            }
        }
        let clients = connections
            .into_iter()
            .map(|(name, connection)| {
                let shared = Arc::new(Shared::default());
                let worker = Worker {
                    name: name.clone(),
                    connection,
                    shared: Arc::clone(&shared),
                    written: BTreeMap::new(),
                    outcome: Outcome::default(),
                    last: Instant::now(),
                };
                let stop = Arc::clone(&stop);
                let thread = std::thread::spawn(move || worker.run(&stop));
                Client {
                    name,
                    shared,
                    thread,
                }
            })
            .collect();
        Ok(Load { clients, stop })
    }

    /// Connections lost so far, each with its reason.
    pub fn lost(&self) -> Vec<String> {
        let lost = |client: &Client| {
            let reason = client.shared.lost.lock();
            let reason = reason.unwrap_or_else(PoisonError::into_inner).clone()?;
            Some(format!("{}: {reason}", client.name))
        };
        self.clients.iter().filter_map(lost).collect()
    }

    /// Waits until every client has had that many more answers, or has lost
    /// its connection.
    ///
    /// # Errors
    /// If a client gets no answers.
    pub fn progress(&self, answers: u64, timeout: Duration) -> Result<()> {
        let begun = Instant::now();
        let had = |client: &Client| client.shared.answers.load(Ordering::Relaxed);
        let wanted: Vec<u64> = self.clients.iter().map(|c| had(c) + answers).collect();
        for (client, wanted) in self.clients.iter().zip(wanted) {
            while client.shared.answers.load(Ordering::Relaxed) < wanted {
                if client.thread.is_finished() {
                    break;
                }
                if begun.elapsed() > timeout {
                    bail!("{} got no answers within {timeout:?}", client.name);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// The longest time between two answers since the last call.
    pub fn take_longest_gap(&self) -> Duration {
        let gap = |client: &Client| client.shared.gap.swap(0, Ordering::Relaxed);
        Duration::from_micros(self.clients.iter().map(gap).max().unwrap_or_default())
    }

    /// Stops the clients after each has read back everything it has written.
    pub fn finish(self) -> Summary {
        self.stop.store(true, Ordering::Relaxed);
        let mut summary = Summary {
            connections: self.clients.len(),
            ..Summary::default()
        };
        for client in self.clients {
            let outcome = client.thread.join().unwrap_or_else(|_| Outcome {
                wrong: vec!["its thread panicked".to_owned()],
                ..Outcome::default()
            });
            let named = |text: String| format!("{}: {text}", client.name);
            let lost = client.shared.lost.lock();
            let lost = lost.unwrap_or_else(PoisonError::into_inner).take();
            summary.lost.extend(lost.map(named));
            summary.wrong.extend(outcome.wrong.into_iter().map(named));
            summary
                .missing
                .extend(outcome.missing.into_iter().map(named));
            summary.acknowledged += outcome.acknowledged;
            summary.answers += client.shared.answers.load(Ordering::Relaxed);
            let gap = Duration::from_micros(client.shared.gap.load(Ordering::Relaxed));
            summary.longest_gap = summary.longest_gap.max(gap);
        }
        summary
    }
}

/// A client's thread.
struct Worker {
    name: String,
    connection: Connection,
    shared: Arc<Shared>,
    /// Version acknowledged last, by slot.
    written: BTreeMap<u64, u64>,
    outcome: Outcome,
    last: Instant,
}

impl Worker {
    fn run(mut self, stop: &AtomicBool) -> Outcome {
        let result = self.work(stop);
        if let Err(error) = result {
            let mut lost = self
                .shared
                .lost
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *lost = Some(format!("{error:#}"));
        }
        self.outcome
    }

    fn work(&mut self, stop: &AtomicBool) -> Result<()> {
        self.last = Instant::now();
        let mut turn = 0u64;
        while !stop.load(Ordering::Relaxed) {
            let slot = turn % SLOTS;
            let value = value(&self.name, slot, turn);
            let stored = self.connection.set(&self.key(slot), &value)?;
            self.answered();
            if stored {
                self.written.insert(slot, turn);
                self.outcome.acknowledged += 1;
            } else {
                self.outcome.wrong.push(format!("write {turn} was refused"));
            }
            std::thread::sleep(THINK);
            // Steps through all slots, old and new ones.
            self.check(turn.wrapping_mul(37) % SLOTS, false)?;
            std::thread::sleep(THINK);
            turn += 1;
        }
        for slot in 0..SLOTS {
            self.check(slot, true)?;
        }
        Ok(())
    }

    fn key(&self, slot: u64) -> String {
        format!("load:{}:{slot}", self.name)
    }

    /// Reads a slot and compares.
    fn check(&mut self, slot: u64, at_end: bool) -> Result<()> {
        let found = self.connection.get(&self.key(slot))?;
        self.answered();
        let wanted = self
            .written
            .get(&slot)
            .map(|turn| value(&self.name, slot, *turn));
        if found != wanted {
            let show = |value: &Option<Vec<u8>>| {
                value.as_ref().map_or("nothing".to_owned(), |bytes| {
                    String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned()
                })
            };
            let text = format!("slot {slot} holds {}, not {}", show(&found), show(&wanted));
            let list = if at_end {
                &mut self.outcome.missing
            } else {
                &mut self.outcome.wrong
            };
            list.push(text);
        }
        Ok(())
    }

    /// Counts an answer and the time since the one before.
    fn answered(&mut self) {
        let gap = u64::try_from(self.last.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.last = Instant::now();
        self.shared.gap.fetch_max(gap, Ordering::Relaxed);
        self.shared.answers.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a client writes: says who, where and when, then a filler of varying
/// length that depends on all three.
fn value(name: &str, slot: u64, turn: u64) -> Vec<u8> {
    let mut text = format!("{name}/{slot}/{turn}/").into_bytes();
    let mut state = (slot << 32 | turn).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..state % 60 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.extend_from_slice(&state.to_le_bytes());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// What is wrong with the server.
    #[derive(Clone, Copy)]
    enum Flaw {
        None,
        /// Says nothing for a while.
        Late,
        /// Forgets everything.
        Forgetful,
        /// Acknowledges what it does not store.
        Liar,
        /// Closes connections.
        Closes,
    }

    /// Serves memcached's protocol; shows the flaw from the 20th request on.
    fn serve(stream: TcpStream, flaw: Flaw) -> Option<()> {
        let mut values = HashMap::new();
        let mut out = stream.try_clone().ok()?;
        let mut lines = BufReader::new(stream);
        for request in 0.. {
            let mut line = String::new();
            lines.read_line(&mut line).ok()?;
            let words: Vec<&str> = line.trim().split(' ').collect();
            let flawed = request >= 20;
            match flaw {
                Flaw::Late if request == 20 => std::thread::sleep(Duration::from_millis(700)),
                Flaw::Forgetful if request == 20 => values.clear(),
                Flaw::Closes if flawed => return None,
                _ => {}
            }
            let answer = match words[..] {
                ["version"] => b"VERSION 1\r\n".to_vec(),
                ["set", key, _, _, length] => {
                    let mut value = vec![0; length.parse::<usize>().ok()? + 2];
                    lines.read_exact(&mut value).ok()?;
                    if !(flawed && matches!(flaw, Flaw::Liar)) {
                        values.insert(key.to_owned(), value);
                    }
                    b"STORED\r\n".to_vec()
                }
                ["get", key] => match values.get(key) {
                    Some(value) => {
                        let head = format!("VALUE {key} 0 {}\r\n", value.len() - 2);
                        [head.as_bytes(), value, b"END\r\n"].concat()
                    }
                    None => b"END\r\n".to_vec(),
                },
                _ => return None,
            };
            out.write_all(&answer).ok()?;
        }
        None
    }

    fn load(flaw: Flaw) -> Summary {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target {
            protocol: Protocol::Memcached,
            port: listener.local_addr().unwrap().port(),
            clients: 2,
        };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || serve(stream, flaw));
            }
        });
        let load = Load::start(&[target]).unwrap();
        load.progress(60, Duration::from_secs(60)).unwrap();
        load.finish()
    }

    #[test]
    fn an_honest_server_passes() {
        let summary = load(Flaw::None);
        assert!(summary.clean(), "{summary:?}");
        assert!(summary.acknowledged >= 60);
    }

    #[test]
    fn a_late_answer_is_a_gap_and_no_loss() {
        let summary = load(Flaw::Late);
        assert!(summary.clean(), "{summary:?}");
        assert!(summary.longest_gap >= Duration::from_millis(700));
    }

    #[test]
    fn lost_writes_are_found() {
        assert!(!load(Flaw::Forgetful).clean());
        assert!(!load(Flaw::Liar).missing.is_empty());
    }

    #[test]
    fn lost_connections_are_counted() {
        let summary = load(Flaw::Closes);
        assert_eq!(summary.lost.len(), 2, "{summary:?}");
    }
}
