//! Reading records out of the bytes BPF programs wrote, without trusting those bytes.

use super::events::{self, RecHdr, RecKind};

/// A record type of `bpf/events.h` and the number it carries in its header.
///
/// # Safety
///
/// The type must be valid for every bit pattern, have no padding, and start with a [`RecHdr`].
pub unsafe trait Record: Copy {
    /// The value of `hdr.kind`.
    const KIND: u32;
}

/// Declares that types of `events.h` are the records of these kinds.
#[macro_export]
macro_rules! impl_record {
    ($($type:ty => $kind:expr),+ $(,)?) => {$(
        // SAFETY: bindgen made the type from events.h, which allows integers and arrays of them
        // only, asserts sizes that leave no room for padding, and puts a rec_hdr first.
        unsafe impl $crate::bpf::record::Record for $type {
            const KIND: u32 = $kind;
        }
    )+};
}

impl_record! {
    events::ThreadRec => RecKind::THREAD,
    events::ProcessRec => RecKind::PROCESS,
    events::MmRec => RecKind::MM,
    events::SigactionsRec => RecKind::SIGACTIONS,
    events::TimerRec => RecKind::TIMER,
    events::FileRec => RecKind::FILE,
    events::EpollRec => RecKind::EPOLL,
    events::EventfdRec => RecKind::EVENTFD,
    events::PipeRec => RecKind::PIPE,
    events::TimerfdRec => RecKind::TIMERFD,
    events::SignalfdRec => RecKind::SIGNALFD,
    events::PidfdRec => RecKind::PIDFD,
    events::SockRec => RecKind::SOCKET,
    events::EpollItemRec => RecKind::EPOLL_ITEM,
    events::WatchRec => RecKind::WATCH,
    events::LockRec => RecKind::LOCK,
    events::VmaRec => RecKind::VMA,
    events::TtyRec => RecKind::TTY,
    events::TtyDataRec => RecKind::TTY_DATA,
    events::AioRec => RecKind::AIO,
    events::MemberRec => RecKind::MEMBER,
    events::UringRec => RecKind::URING,
    events::PressureRec => RecKind::PRESSURE,
    events::MqueueRec => RecKind::MQUEUE,
    events::MqueueDataRec => RecKind::MQUEUE_DATA,
    events::SemUndoRec => RecKind::SEM_UNDO,
    events::WaitingRec => RecKind::WAITING,
    events::WaitingDataRec => RecKind::WAITING_DATA,
    events::RegistersRec => RecKind::REGISTERS,
}

/// A record whose bytes do not fit its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("BPF record of kind {kind} and {size} bytes at offset {offset} is malformed")]
pub struct Malformed {
    /// Kind found in the header, 0 if there was no room for a header.
    pub kind: u32,
    /// Size found in the header.
    pub size: u32,
    /// Where in the buffer.
    pub offset: usize,
}

/// A type of `events.h` that is a key or value of a BPF map.
///
/// # Safety
///
/// The type must have no padding.
pub unsafe trait Plain: Copy {}

// SAFETY: events.h allows no implicit padding and asserts the sizes.
unsafe impl Plain for events::LockFlowKey {}
// SAFETY: as above.
unsafe impl Plain for events::LockPortKey {}
// SAFETY: as above.
unsafe impl Plain for events::LockControl {}

/// The bytes a BPF map takes for this key or value.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: a Plain type has no padding, so all of its bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// One undecoded record.
#[derive(Clone, Copy, Debug)]
pub struct Raw<'a> {
    /// Kind in the header.
    pub kind: u32,
    offset: usize,
    bytes: &'a [u8],
}

impl Raw<'_> {
    /// The record as its type.
    ///
    /// # Errors
    ///
    /// The kind or the size is not that of `T`.
    pub fn decode<T: Record>(&self) -> Result<T, Malformed> {
        if self.kind != T::KIND || self.bytes.len() != size_of::<T>() {
            return Err(Malformed {
                kind: self.kind,
                size: u32::try_from(self.bytes.len()).unwrap_or(u32::MAX),
                offset: self.offset,
            });
        }
        // SAFETY: Record promises that any bytes are a valid T, and there are size_of::<T>() of
        // them; the read does not need alignment.
        Ok(unsafe { self.bytes.as_ptr().cast::<T>().read_unaligned() })
    }
}

/// Walks the records laid end to end in `bytes`; ends after the first malformed one.
pub fn records(bytes: &[u8]) -> impl Iterator<Item = Result<Raw<'_>, Malformed>> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(offset..)?;
        if rest.is_empty() {
            return None;
        }
        let at = offset;
        let Some((kind, size)) = header(rest) else {
            offset = bytes.len();
            return Some(Err(Malformed {
                kind: 0,
                size: 0,
                offset: at,
            }));
        };
        let len = size as usize;
        if len < size_of::<RecHdr>() || len > rest.len() {
            offset = bytes.len();
            return Some(Err(Malformed {
                kind,
                size,
                offset: at,
            }));
        }
        offset += len;
        Some(Ok(Raw {
            kind,
            offset: at,
            bytes: &rest[..len],
        }))
    })
}

fn header(bytes: &[u8]) -> Option<(u32, u32)> {
    let kind = bytes.first_chunk::<4>()?;
    let size = bytes.get(4..)?.first_chunk::<4>()?;
    Some((u32::from_ne_bytes(*kind), u32::from_ne_bytes(*size)))
}

/// The text of a fixed-size, NUL-padded C string; bytes that are not UTF-8 are replaced.
#[must_use]
pub fn c_text(chars: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = chars
        .iter()
        .map(|c| c.to_ne_bytes()[0])
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signalfd(mask: u64) -> Vec<u8> {
        let mut bytes = RecKind::SIGNALFD.to_ne_bytes().to_vec();
        bytes.extend(16u32.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes
    }

    #[test]
    fn records_end_to_end_are_decoded() {
        let bytes = [signalfd(1), signalfd(2)].concat();
        let masks: Vec<u64> = records(&bytes)
            .map(|raw| raw.unwrap().decode::<events::SignalfdRec>().unwrap().mask)
            .collect();
        assert_eq!(masks, [1, 2]);
    }

    #[test]
    fn a_record_is_not_decoded_as_another_kind() {
        let bytes = signalfd(1);
        let raw = records(&bytes).next().unwrap().unwrap();
        assert_eq!(
            raw.decode::<events::PidfdRec>().unwrap_err().kind,
            RecKind::SIGNALFD
        );
    }

    #[test]
    fn a_torn_record_is_an_error_and_the_end() {
        let bytes = [signalfd(1), signalfd(2)].concat();
        for cut in 17..bytes.len() {
            let mut walk = records(&bytes[..cut]);
            assert!(walk.next().unwrap().is_ok());
            assert_eq!(walk.next().unwrap().unwrap_err().offset, 16);
            assert!(walk.next().is_none());
        }
    }

    #[test]
    fn a_size_smaller_than_the_header_cannot_loop() {
        let bytes = [1u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
        let all: Vec<_> = records(&bytes).collect();
        assert_eq!(all.len(), 1);
        assert!(all[0].is_err());
    }
}
