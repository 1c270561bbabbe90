/// A decoded picture, read row by row, so that a phone's photograph is never held twice.
public protocol Raster {
    var width: Int { get }
    var height: Int { get }

    /// Row `y` as 0xAARRGGBB, not premultiplied, into the first `width` places.
    func row(_ y: Int, into row: inout [UInt32])
}

/// A picture in an array, row by row as 0xAARRGGBB.
public struct PixelRaster: Raster, Sendable, Equatable {
    public let width: Int
    public let height: Int
    public let pixels: [UInt32]

    public init(width: Int, height: Int, pixels: [UInt32]) {
        precondition(pixels.count == width * height, "\(pixels.count) pixels are not \(width)×\(height)")
        (self.width, self.height, self.pixels) = (width, height, pixels)
    }

    /// Planes (3, height, width) of red, green and blue from 0 to 1, rounded.
    init(unit values: Values<Float>, width: Int, height: Int) {
        let plane = width * height
        func byte(_ index: Int) -> UInt32 { UInt32((min(max(values[index], 0), 1) * 255).rounded(.toNearestOrEven)) }
        self.init(
            width: width, height: height,
            pixels: (0..<plane).map { 0xFF00_0000 | byte($0) << 16 | byte($0 + plane) << 8 | byte($0 + 2 * plane) })
    }

    public func row(_ y: Int, into row: inout [UInt32]) {
        row.withUnsafeMutableBufferPointer { target in
            for x in 0..<width { target[x] = pixels[y * width + x] }
        }
    }

    /// The picture upright, by the EXIF orientation that its camera noted: 1 to 8; others are left as they are.
    public func upright(_ orientation: Int) -> PixelRaster {
        guard (2...8).contains(orientation) else { return self }
        let (newWidth, newHeight) = orientation >= 5 ? (height, width) : (width, height)
        var found: [UInt32] = []
        found.reserveCapacity(pixels.count)
        for y in 0..<newHeight {
            for x in 0..<newWidth {
                let from: (x: Int, y: Int)
                switch orientation {
                case 2: from = (width - 1 - x, y)
                case 3: from = (width - 1 - x, height - 1 - y)
                case 4: from = (x, height - 1 - y)
                case 5: from = (y, x)
                case 6: from = (y, height - 1 - x)
                case 7: from = (width - 1 - y, height - 1 - x)
                default: from = (width - 1 - y, x)
                }
                found.append(pixels[from.y * width + from.x])
            }
        }
        return PixelRaster(width: newWidth, height: newHeight, pixels: found)
    }
}

/// How a camera was held, as a JPEG's EXIF block says. Source: EXIF 2.32, section 4.6.4, tag 274.
enum Orientation {
    private static let tag = 0x0112

    /// 1 to 8; 1 where nothing is said, or what is said is damaged.
    static func of(_ data: [UInt8]) -> Int {
        guard let found = find(data), (1...8).contains(found) else { return 1 }
        return found
    }

    private static func find(_ data: [UInt8]) -> Int? {
        guard short(data, 0, big: true) == 0xFFD8 else { return nil }
        var at = 2
        while at + 4 <= data.count, data[at] == 0xFF {
            let marker = data[at + 1]
            if marker == 0xDA { return nil }
            if marker == 0xE1, data[(at + 4)...].starts(with: "Exif\0\0".utf8) { return inTiff(data, at + 10) }
            at += 2 + short(data, at + 2, big: true)!
        }
        return nil
    }

    private static func inTiff(_ data: [UInt8], _ start: Int) -> Int? {
        guard let order = short(data, start, big: true) else { return nil }
        let big = order == 0x4D4D
        guard let one = short(data, start + 4, big: big), let two = short(data, start + 6, big: big) else { return nil }
        let table = start + (big ? one << 16 | two : two << 16 | one)
        guard let count = short(data, table, big: big) else { return nil }
        for index in 0..<count {
            let entry = table + 2 + 12 * index
            guard let found = short(data, entry, big: big) else { return nil }
            if found == tag { return short(data, entry + 8, big: big) }
        }
        return nil
    }

    private static func short(_ data: [UInt8], _ at: Int, big: Bool) -> Int? {
        guard at >= 0, at + 1 < data.count else { return nil }
        let (one, two) = (Int(data[at]), Int(data[at + 1]))
        return big ? one << 8 | two : two << 8 | one
    }
}
