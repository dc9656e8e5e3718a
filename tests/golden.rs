//! Images of format version 1 stay readable. `tests/golden/` holds one on each carrier, written
//! when the format was new; what they say must be what the sample says today. A field that is
//! renamed, or added without a default, fails here.
//!
//! `UPDATE_GOLDEN=1 cargo test --test golden` writes them anew. That is right only as long as no
//! image of this version is in use.

mod sample;

use std::fs;
use std::path::{Path, PathBuf};
use tracker::image::{DirectoryStore, Pages, RangeStore, Store, decode, encode};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn updating() -> bool {
    std::env::var_os("UPDATE_GOLDEN").is_some()
}

fn write(mut store: impl Store) {
    let image = sample::everything(&store);
    store.commit(&encode(&image), sample::SLOTS).unwrap();
}

/// Reads all there is and compares it with the sample, one object at a time.
fn check(store: &impl Store) {
    let found = decode(&store.metadata().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let other = DirectoryStore::create(&dir.path().join("image")).unwrap();
    let wanted = sample::everything(&other);
    assert_eq!(found.system, wanted.system);
    assert_eq!(found.slots, wanted.slots);
    for (found, wanted) in found.applications.iter().zip(&wanted.applications) {
        assert_eq!(found.header, wanted.header);
        assert_eq!(found.processes, wanted.processes);
        assert_eq!(found.mms, wanted.mms);
        assert_eq!(found.files, wanted.files);
        for (found, wanted) in found.ofds.iter().zip(&wanted.ofds) {
            assert_eq!(found, wanted);
        }
        assert_eq!(found.ofds.len(), wanted.ofds.len());
        assert_eq!(found.contents, wanted.contents);
    }
    assert_eq!(found, wanted);

    let mut pages = vec![0; sample::pages().len()];
    store.read_pages(0, &mut pages).unwrap();
    assert_eq!(pages, sample::pages());
    for application in &found.applications {
        Pages::new(store, &found.slots).verify(application).unwrap();
    }
}

#[test]
fn a_directory_of_version_1_is_read() {
    let path = golden("v1");
    if updating() {
        let _ = fs::remove_dir_all(&path);
        write(DirectoryStore::create(&path).unwrap());
    }
    check(&DirectoryStore::open(&path).unwrap());
}

#[test]
fn a_range_of_version_1_is_read() {
    let path = golden("v1.arena");
    if updating() {
        fs::write(&path, [0; 48 << 10]).unwrap();
        write(RangeStore::create(&path).unwrap());
    }
    // A range is opened for writing too.
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("arena");
    fs::copy(&path, &copy).unwrap();
    check(&RangeStore::open(&copy).unwrap());
}
