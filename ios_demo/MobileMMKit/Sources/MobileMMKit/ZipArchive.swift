import CZlib
import Foundation

/// Reads zip files of strangers: what the directory at the end says is checked before anything is unpacked.
///
/// Stored and deflated entries, zip64 among them; no encryption, no links, nothing that overlaps, nothing before or behind
/// the archive. Source: PKWARE's APPNOTE.TXT 6.3.10.
struct ZipArchive {
    struct Entry: Sendable {
        let name: String
        let isLink: Bool
        let isEncrypted: Bool
        /// 0 for stored, 8 for deflated.
        let method: Int
        let crc: UInt32
        let packed: Int
        /// When it is unpacked.
        let size: Int
        /// Where its own header begins.
        let at: Int

        var isFolder: Bool { name.hasSuffix("/") }
    }

    private struct Damaged: Error {
        let why: String
    }

    static let mostEntries = 10_000
    private static let mostDirectory = 8 << 20
    private static let piece = 1 << 18

    let file: URL
    let entries: [Entry]
    private let handle: FileHandle
    /// Where the directory begins.
    private let end: Int

    /// Throws ``MobileMMError`` for what is no zip file, or no honest one.
    init(_ file: URL) throws {
        self.file = file
        do {
            handle = try FileHandle(forReadingFrom: file)
            let found = try Self.directory(handle)
            (entries, end) = (try Self.entries(found.bytes, found.count), found.at)
            try checkPlaces()
        } catch let damaged as Damaged {
            throw MobileMMError("\(file.path): is no zip file, or damaged (\(damaged.why))")
        } catch let error as MobileMMError {
            throw error
        } catch {
            throw MobileMMError("\(file.path): cannot be read (\(oneLine(error)))")
        }
    }

    func close() { try? handle.close() }

    /// Unpacks an entry piece by piece; more than the size that it declares, or less, is refused.
    func unpack(_ entry: Entry, each: (UnsafeRawBufferPointer) throws -> Void) throws {
        func refusal(_ wrong: String) -> MobileMMError { MobileMMError("\(file.path): \(shown(entry.name)) \(wrong)") }
        if entry.isEncrypted { throw refusal("is encrypted") }
        if entry.isLink { throw refusal("is a link") }
        if entry.method != 0 && entry.method != 8 { throw refusal("is packed by method \(entry.method), unknown here") }
        var (count, sum) = (0, crc32(0, nil, 0))
        func take(_ bytes: UnsafeRawBufferPointer) throws {
            count += bytes.count
            if count > entry.size { throw refusal("is longer than the \(entry.size) bytes that it declares") }
            if bytes.isEmpty { return }
            sum = crc32(sum, bytes.bindMemory(to: UInt8.self).baseAddress, UInt32(bytes.count))
            try each(bytes)
        }
        do {
            try handle.seek(toOffset: UInt64(try Self.dataStart(handle, entry)))
            try entry.method == 0 ? copy(entry, take) : inflate(entry, take)
        } catch is Damaged {
            throw refusal("is damaged")
        }
        if count != entry.size { throw refusal("has \(count) bytes, where it declares \(entry.size)") }
        if UInt32(truncatingIfNeeded: sum) != entry.crc { throw refusal("is damaged: its checksum is another one") }
    }

    private func copy(_ entry: Entry, _ take: (UnsafeRawBufferPointer) throws -> Void) throws {
        if entry.packed != entry.size { throw Damaged(why: "sizes") }
        try pieces(entry) { try $0.withUnsafeBytes(take) }
    }

    private func inflate(_ entry: Entry, _ take: (UnsafeRawBufferPointer) throws -> Void) throws {
        var stream = z_stream()
        // Minus: deflate alone, without zlib's own header.
        guard inflateInit2_(&stream, -MAX_WBITS, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK else {
            throw Damaged(why: "zlib")
        }
        defer { inflateEnd(&stream) }
        let room = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.piece, alignment: 16)
        defer { room.deallocate() }
        var isAtEnd = false
        try pieces(entry) { data in
            if isAtEnd { throw Damaged(why: "something behind its end") }
            var data = data
            try data.withUnsafeMutableBytes { bytes in
                stream.next_in = bytes.bindMemory(to: UInt8.self).baseAddress
                stream.avail_in = UInt32(bytes.count)
                repeat {
                    stream.next_out = room.bindMemory(to: UInt8.self).baseAddress
                    stream.avail_out = UInt32(room.count)
                    let status = CZlib.inflate(&stream, Z_NO_FLUSH)
                    // No progress is no fault: there is simply no more input.
                    guard status == Z_OK || status == Z_STREAM_END || status == Z_BUF_ERROR else {
                        throw Damaged(why: "deflate")
                    }
                    try take(UnsafeRawBufferPointer(rebasing: room[..<(room.count - Int(stream.avail_out))]))
                    isAtEnd = status == Z_STREAM_END
                    if isAtEnd && stream.avail_in > 0 { throw Damaged(why: "something behind its end") }
                } while !isAtEnd && stream.avail_out == 0
            }
        }
        if !isAtEnd { throw Damaged(why: "deflate") }
    }

    private func pieces(_ entry: Entry, _ each: (Data) throws -> Void) throws {
        var left = entry.packed
        while left > 0 {
            try Task.checkCancellation()
            guard let data = try handle.read(upToCount: min(left, Self.piece)), !data.isEmpty else {
                throw Damaged(why: "ends early")
            }
            left -= data.count
            try each(data)
        }
    }

    // MARK: the directory

    /// No two entries may share bytes: small files that unpack to huge ones are made so.
    private func checkPlaces() throws {
        var free = 0
        for entry in entries.sorted(by: { $0.at < $1.at }) {
            if entry.at < free { throw Damaged(why: "entries overlap") }
            let start = try Self.dataStart(handle, entry)
            if start > end || entry.packed > end - start { throw Damaged(why: "an entry reaches into the directory") }
            free = start + entry.packed
        }
    }

    /// Where an entry's data begin: behind its own header, whose lengths may differ from those in the directory.
    private static func dataStart(_ handle: FileHandle, _ entry: Entry) throws -> Int {
        try handle.seek(toOffset: UInt64(entry.at))
        let header = Fields(try handle.read(upToCount: 30) ?? Data())
        guard header.bytes.count == 30, try header.number(0, 4) == 0x0403_4B50 else { throw Damaged(why: "an entry's header") }
        return entry.at + 30 + (try header.number(26, 2)) + (try header.number(28, 2))
    }

    /// The directory's bytes, how many entries it has, and where it begins.
    private static func directory(_ handle: FileHandle) throws -> (bytes: Data, count: Int, at: Int) {
        let length = Int(try handle.seekToEnd())
        // The end record is 22 bytes and a comment of up to 65,535.
        let from = max(0, length - 22 - 0xFFFF)
        try handle.seek(toOffset: UInt64(from))
        let tail = Fields(try handle.read(upToCount: length - from) ?? Data())
        var place = tail.bytes.count - 22
        while place >= 0 {
            if try tail.number(place, 4) == 0x0605_4B50,
                try place + 22 + tail.number(place + 20, 2) == tail.bytes.count
            {
                break
            }
            place -= 1
        }
        if place < 0 { throw Damaged(why: "it has no end record") }
        var stop = from + place
        if try tail.number(place + 4, 2) != 0 || tail.number(place + 6, 2) != 0 { throw Damaged(why: "several disks") }
        var count = try tail.number(place + 10, 2)
        var size = try tail.number(place + 12, 4)
        var at = try tail.number(place + 16, 4)
        if count == 0xFFFF || size == 0xFFFF_FFFF || at == 0xFFFF_FFFF, place >= 20,
            try tail.number(place - 20, 4) == 0x0706_4B50
        {
            stop = try tail.number(place - 12, 8)
            if stop > length - 56 { throw Damaged(why: "its end record") }
            try handle.seek(toOffset: UInt64(stop))
            let record = Fields(try handle.read(upToCount: 56) ?? Data())
            if try record.number(0, 4) != 0x0606_4B50 { throw Damaged(why: "its end record") }
            (count, size, at) = (try record.number(32, 8), try record.number(40, 8), try record.number(48, 8))
        }
        if count > mostEntries || size > mostDirectory { throw Damaged(why: "more than \(mostEntries) files") }
        if at > stop || stop - at != size { throw Damaged(why: "its directory is not where it should be") }
        try handle.seek(toOffset: UInt64(at))
        let bytes = try handle.read(upToCount: size) ?? Data()
        if bytes.count != size { throw Damaged(why: "it ends early") }
        return (bytes, count, at)
    }

    private static func entries(_ bytes: Data, _ count: Int) throws -> [Entry] {
        let fields = Fields(bytes)
        var (found, at) = ([Entry](), 0)
        for _ in 0..<count {
            guard try fields.number(at, 4) == 0x0201_4B50 else { throw Damaged(why: "its directory") }
            let flags = try fields.number(at + 8, 2)
            let (name, extra) = (try fields.number(at + 28, 2), try fields.number(at + 30, 2))
            let comment = try fields.number(at + 32, 2)
            var sizes = [try fields.number(at + 24, 4), try fields.number(at + 20, 4), try fields.number(at + 42, 4)]
            if sizes.contains(0xFFFF_FFFF) { try large(fields, at + 46 + name, extra, &sizes) }
            // Of Unix, in the upper half: 0xA000 marks a link.
            let isLink = try fields.number(at + 5, 1) == 3 && fields.number(at + 40, 2) & 0xF000 == 0xA000
            found.append(
                Entry(
                    name: try fields.text(at + 46, name), isLink: isLink, isEncrypted: flags & 0x41 != 0,
                    method: try fields.number(at + 10, 2), crc: UInt32(try fields.number(at + 16, 4)), packed: sizes[1],
                    size: sizes[0], at: sizes[2]))
            at += 46 + name + extra + comment
        }
        if at != bytes.count { throw Damaged(why: "its directory") }
        return found
    }

    /// Sizes that do not fit into 32 bits stand in an extra field, those alone, in this order.
    private static func large(_ fields: Fields, _ start: Int, _ length: Int, _ sizes: inout [Int]) throws {
        var at = start
        while at + 4 <= start + length {
            let (kind, count) = (try fields.number(at, 2), try fields.number(at + 2, 2))
            if kind == 1 && at + 4 + count <= start + length {
                var place = at + 4
                for index in sizes.indices where sizes[index] == 0xFFFF_FFFF {
                    if place + 8 > at + 4 + count { throw Damaged(why: "its directory") }
                    sizes[index] = try fields.number(place, 8)
                    place += 8
                }
                return
            }
            at += 4 + count
        }
        throw Damaged(why: "its directory")
    }

    /// Numbers of one to eight bytes, the lowest first.
    private struct Fields {
        let bytes: [UInt8]

        init(_ data: Data) {
            bytes = [UInt8](data)
        }

        func number(_ at: Int, _ count: Int) throws -> Int {
            guard at >= 0, at <= bytes.count - count else { throw Damaged(why: "it ends early") }
            let value = bytes[at..<at + count].reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
            // No file is that long; sums of such numbers cannot overflow.
            guard value < 1 << 60 else { throw Damaged(why: "a number out of range") }
            return Int(value)
        }

        func text(_ at: Int, _ count: Int) throws -> String {
            guard at <= bytes.count - count else { throw Damaged(why: "it ends early") }
            return String(decoding: bytes[at..<at + count], as: UTF8.self)
        }
    }
}
