//! The host's end of the control channel.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::protocol::{Hello, Reply, Request, ToGuest, ToHost, encode};

/// Why a request got no answer.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The VM is gone, with the reason as far as it is known.
    #[error("The VM ended: {0}")]
    Dead(String),
    /// The guest's agent started anew after the request: a kexec or a restart.
    #[error("The guest restarted as {} before it answered", .0.release)]
    Restarted(Hello),
    /// Neither answer nor end.
    #[error("No answer from the guest within {0:?}")]
    Timeout(Duration),
    /// The guest could not do it.
    #[error("{0}")]
    Refused(String),
    /// The socket to QEMU broke.
    #[error("Write to the control socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The guest answered something else.
    #[error("The guest's answer does not fit the request: {0}")]
    Protocol(String),
}

/// State shared by the threads that wait for the guest.
#[derive(Debug, Default)]
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Every hello since the VM was started.
    hellos: Vec<Hello>,
    replies: HashMap<u64, Reply>,
    dead: Option<String>,
}

impl Shared {
    /// Marks the VM as gone; the first reason stays.
    pub fn end(&self, reason: impl FnOnce() -> String) {
        let mut state = self.lock();
        if state.dead.is_none() {
            state.dead = Some(reason());
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Takes in what the guest says when its agent starts.
    pub fn greet(&self, hello: Hello) {
        let mut state = self.lock();
        state.replies.clear();
        state.hellos.push(hello);
        drop(state);
        self.changed.notify_all();
    }

    /// Why the VM ended, if it has.
    pub fn dead(&self) -> Option<String> {
        self.lock().dead.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` finds something, the VM ends or time is up.
    fn wait_until<T>(
        &self,
        timeout: Duration,
        mut done: impl FnMut(&mut State) -> Option<Result<T, ControlError>>,
    ) -> Result<T, ControlError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(result) = done(&mut state) {
                return result;
            }
            if let Some(reason) = &state.dead {
                return Err(ControlError::Dead(reason.clone()));
            }
            let left = deadline
                .checked_duration_since(Instant::now())
                .ok_or(ControlError::Timeout(timeout))?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A connection to the guest's agent that outlives the guest's kernel.
#[derive(Debug)]
pub struct Control {
    shared: Arc<Shared>,
    writer: Mutex<UnixStream>,
    next_id: AtomicU64,
}

impl Control {
    /// Connects to QEMU's socket.
    ///
    /// # Errors
    /// If QEMU does not listen there.
    pub fn connect(socket: &Path, shared: Arc<Shared>) -> std::io::Result<Control> {
        let stream = UnixStream::connect(socket)?;
        let reader = BufReader::new(stream.try_clone()?);
        let to = Arc::clone(&shared);
        std::thread::spawn(move || receive(reader, &to));
        Ok(Control {
            shared,
            writer: Mutex::new(stream),
            next_id: AtomicU64::new(1),
        })
    }

    /// How many times the guest's agent has started.
    pub fn boots(&self) -> usize {
        self.shared.lock().hellos.len()
    }

    /// The last hello, if there was one.
    pub fn hello(&self) -> Option<Hello> {
        self.shared.lock().hellos.last().cloned()
    }

    /// Waits until the guest's agent has started more than `boots` times.
    ///
    /// # Errors
    /// If the VM ends or time is up.
    pub fn wait_for_hello(&self, boots: usize, timeout: Duration) -> Result<Hello, ControlError> {
        self.shared.wait_until(timeout, |state| {
            state
                .hellos
                .get(boots)
                .map(|_| ())
                .map(|()| Ok(state.hellos[state.hellos.len() - 1].clone()))
        })
    }

    /// Sends a request and waits for the answer.
    ///
    /// # Errors
    /// Those of [`ControlError`].
    pub fn request(&self, request: Request, timeout: Duration) -> Result<Reply, ControlError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let boots = self.boots();
        let line = encode(&ToGuest { id, request })
            .map_err(|error| ControlError::Protocol(error.to_string()))?;
        let written = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&line);
        if let Err(error) = written {
            let reason = self.shared.dead();
            return Err(reason.map_or(ControlError::Socket(error), ControlError::Dead));
        }
        let reply = self.shared.wait_until(timeout, |state| {
            if let Some(reply) = state.replies.remove(&id) {
                return Some(Ok(reply));
            }
            let restarted = state.hellos.len() > boots;
            restarted.then(|| {
                Err(ControlError::Restarted(
                    state.hellos[state.hellos.len() - 1].clone(),
                ))
            })
        })?;
        match reply {
            Reply::Failed { message } => Err(ControlError::Refused(message)),
            reply => Ok(reply),
        }
    }
}

/// Takes in what the guest says until QEMU closes the socket.
fn receive(mut reader: BufReader<UnixStream>, shared: &Shared) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // What a kexec cut short is no message.
        let Ok(message) = serde_json::from_slice::<ToHost>(&line) else {
            continue;
        };
        match message {
            ToHost::Hello(hello) => shared.greet(hello),
            ToHost::Reply { id, reply } => {
                shared.lock().replies.insert(id, reply);
                shared.changed.notify_all();
            }
        }
    }
}
