//! What goes over the control socket: framed CBOR requests, each with a framed CBOR answer.

use super::status::Status;
use crate::bpf::lent::Loan;
use crate::model::diff::Diff;
use crate::model::state::State;
use crate::track::audit::Report;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// A request to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// How it is.
    Status,
    /// Compare the model with the kernel.
    Audit,
    /// The model after everything up to now is applied and suspects were read again.
    Model,
    /// What has changed in the model since it was last sent over this connection, by
    /// everything up to now; suspects are not read.
    Delta,
    /// Lend the spare iterators, until this connection ends.
    Iterators,
    /// End the agent.
    Shutdown,
}

/// Its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// To `Status`.
    Status(Box<Status>),
    /// To `Audit`.
    Audit(Report),
    /// To `Model`.
    Model(Box<State>),
    /// To `Delta`.
    Delta(Box<Diff>),
    /// To `Iterators`.
    Iterators(Loan),
    /// To `Shutdown`.
    Done,
    /// The request could not be served.
    Error(String),
}

/// No message is longer: a model of a million descriptors is a tenth of it.
const MAX_LENGTH: u64 = 1 << 30;

/// Writes a message: its length in eight bytes, little endian, then CBOR.
///
/// # Errors
///
/// Those of the stream.
pub fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let bytes = cbor4ii::serde::to_vec(Vec::new(), message).map_err(io::Error::other)?;
    let length = u64::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_le_bytes())?;
    stream.write_all(&bytes)?;
    stream.flush()
}

/// Reads a message.
///
/// # Errors
///
/// Those of the stream; [`io::ErrorKind::InvalidData`] for what is no such message.
pub fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    if length > MAX_LENGTH {
        return Err(invalid(format!("a message of {length} bytes")));
    }
    // Grows as bytes come in, so that a false length costs nothing.
    let mut bytes = Vec::new();
    let read = stream.take(length).read_to_end(&mut bytes)?;
    if u64::try_from(read).ok() != Some(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    cbor4ii::serde::from_slice(&bytes).map_err(|error| invalid(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::{Fd, OfdId};
    use crate::model::state::{Epoll, EpollItem};

    #[test]
    fn a_model_survives_the_socket() {
        let mut state = State {
            seq: 7,
            ..State::default()
        };
        let item = EpollItem {
            seq: 3,
            events: 1,
            data: u64::MAX,
        };
        let mut epoll = Epoll::default();
        epoll.items.insert((OfdId(u64::MAX - 1), Fd(4)), item);
        state.epolls.insert(OfdId(64), epoll);
        let mut wire = Vec::new();
        send(&mut wire, &Answer::Model(Box::new(state.clone()))).unwrap();
        let Answer::Model(read) = receive(&mut wire.as_slice()).unwrap() else {
            panic!("another answer");
        };
        assert_eq!(*read, state);
    }

    #[test]
    fn a_loan_survives_the_socket() {
        let mut wire = Vec::new();
        send(&mut wire, &Request::Iterators).unwrap();
        let request: Request = receive(&mut wire.as_slice()).unwrap();
        assert_eq!(request, Request::Iterators);
        let loan = Loan::ours([7, 8, 11, u32::MAX], 9, 10);
        let mut wire = Vec::new();
        send(&mut wire, &Answer::Iterators(loan.clone())).unwrap();
        let Answer::Iterators(read) = receive(&mut wire.as_slice()).unwrap() else {
            panic!("another answer");
        };
        assert_eq!(read, loan);
    }

    #[test]
    fn a_cut_message_is_an_error() {
        let mut wire = Vec::new();
        send(&mut wire, &Request::Audit).unwrap();
        for cut in 0..wire.len() {
            assert!(
                receive::<Request>(&mut &wire[..cut]).is_err(),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn a_length_beyond_reason_is_refused() {
        let wire = u64::MAX.to_le_bytes();
        let error = receive::<Request>(&mut wire.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
