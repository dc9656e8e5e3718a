//! Image -> metadata bytes.

use super::Image;
use super::header::Header;
use super::record::{RecordKind, push};
use crate::model::frozen::Process;
use crc32fast::hash;
use serde_bytes::ByteBuf;

/// Encodes an image, sealed.
#[must_use]
pub fn encode(image: &Image) -> Vec<u8> {
    let mut out = Header::current().to_bytes().to_vec();
    let mut records = 0_u64;
    let mut add = |out: &mut Vec<u8>, kind, value: &dyn erased::Value| {
        value.push(out, kind);
        records += 1;
    };
    if let Some(system) = &image.system {
        add(&mut out, RecordKind::System, system);
    }
    let sums = ByteBuf::from(image.slots.to_bytes());
    add(&mut out, RecordKind::Slots, &sums);
    for application in &image.applications {
        add(&mut out, RecordKind::Application, &application.header);
        for process in &application.processes {
            let bare = Process {
                threads: Vec::new(),
                ..process.clone()
            };
            add(&mut out, RecordKind::Process, &bare);
            for thread in &process.threads {
                add(&mut out, RecordKind::Thread, thread);
            }
        }
        for entry in &application.mms {
            add(&mut out, RecordKind::Mm, &entry);
        }
        for entry in &application.files {
            add(&mut out, RecordKind::Files, &entry);
        }
        for entry in &application.ofds {
            add(&mut out, RecordKind::OpenFile, &entry);
        }
        for entry in &application.contents {
            add(&mut out, RecordKind::Content, &entry);
        }
    }
    let seal = (records, hash(&out));
    push(&mut out, RecordKind::Commit, &seal);
    out
}

mod erased {
    //! `Serialize` is not object safe; pushing a record is.
    use super::{RecordKind, push};

    pub(super) trait Value {
        fn push(&self, out: &mut Vec<u8>, kind: RecordKind);
    }

    impl<T: serde::Serialize> Value for T {
        fn push(&self, out: &mut Vec<u8>, kind: RecordKind) {
            push(out, kind, self);
        }
    }
}
