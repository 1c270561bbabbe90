import Foundation

/// Pictures → `pixels` of the vision part, by the manifest's rule, bit for bit as Pillow's `resize` computes them.
///
/// Source: Pillow's documentation of its filters; its arithmetic is fixed-point with 22 bits, rows before columns.
public struct ImageProcessor: Sendable {
    /// Width × height; a 64-megapixel camera still fits.
    public static let maxPixels = 64 << 20
    /// Pictures are padded to a square: a strip of 1×20000 would become 400 megapixels.
    public static let maxSide = 16_384

    private let rule: ImageRule

    public init(_ rule: ImageRule) {
        self.rule = rule
    }

    /// uint8 (3, height, width), row by row. Throws ``MobileMMError`` for a picture that is too large or too narrow.
    public func toPixels(_ picture: any Raster) throws -> [UInt8] {
        let (width, height) = (picture.width, picture.height)
        if width * height > Self.maxPixels || max(width, height) > Self.maxSide {
            throw MobileMMError(
                "a picture of \(width)×\(height) is more than the limit of \(Self.maxPixels) pixels, \(Self.maxSide) a"
                    + " side; scale it down first")
        }
        let rows = OpaqueRows(picture: picture)
        switch rule.strategy {
        case "pad":
            let color = rule.padColor.reduce(0) { $0 << 8 | UInt32($1) }
            let square = Padded(picture: rows, side: max(width, height), color: color)
            return planar(resize(square, rule.width, rule.height))
        case "crop":
            let edge = rule.shortestEdge ?? min(rule.height, rule.width)
            let other = Int(Double(edge * max(width, height)) / Double(min(width, height)))
            let size = width <= height ? (edge, other) : (other, edge)
            if size.0 * size.1 > Self.maxPixels {
                throw MobileMMError("a picture of \(width)×\(height) is too narrow; crop it first")
            }
            return planar(cropped(resize(rows, size.0, size.1), rule.width, rule.height))
        default:
            return planar(resize(rows, rule.width, rule.height))
        }
    }

    private func cropped(_ picture: Rgb, _ width: Int, _ height: Int) -> Rgb {
        func half(_ number: Int) -> Int { number >= 0 ? number / 2 : (number - 1) / 2 }
        let (left, top) = (half(picture.width - width), half(picture.height - height))
        var found = Rgb(width: width, height: height)
        for y in 0..<height where (0..<picture.height).contains(y + top) {
            for x in 0..<width where (0..<picture.width).contains(x + left) {
                let from = 3 * ((y + top) * picture.width + x + left)
                for channel in 0..<3 { found.bytes[3 * (y * width + x) + channel] = picture.bytes[from + channel] }
            }
        }
        return found
    }

    private func planar(_ picture: Rgb) -> [UInt8] {
        let plane = picture.width * picture.height
        return [UInt8](unsafeUninitializedCapacity: 3 * plane) { target, count in
            picture.bytes.withUnsafeBufferPointer { source in
                for channel in 0..<3 {
                    for index in 0..<plane { target[channel * plane + index] = source[3 * index + channel] }
                }
            }
            count = 3 * plane
        }
    }

    private func resize(_ source: any Raster, _ width: Int, _ height: Int) -> Rgb {
        guard let filter = Filter(rawValue: rule.filter) else { return nearest(source, width, height) }
        let columns = width != source.width ? Weights(from: source.width, size: width, filter) : nil
        let rows = height != source.height ? Weights(from: source.height, size: height, filter) : nil
        // The order shows in the last bit. Pillow takes a picture that shrinks far more in height by columns first,
        // since version 13; it can only be one that is not padded to a square.
        let columnsFirst = source.height > height && source.height - height > 2 * (source.width - width)
        if columnsFirst, let rows { return across(rows.vertical(across(source, nil)), columns) }
        let between = across(source, columns)
        return rows?.vertical(between) ?? between
    }

    /// Each row resized by these weights, or as it is.
    private func across(_ source: any Raster, _ columns: Weights?) -> Rgb {
        var found = Rgb(width: columns?.size ?? source.width, height: source.height)
        var row = [UInt32](repeating: 0, count: source.width)
        for y in 0..<source.height {
            source.row(y, into: &row)
            if let columns { columns.horizontal(row, &found, y) } else { found.put(y, row) }
        }
        return found
    }

    private func nearest(_ source: any Raster, _ width: Int, _ height: Int) -> Rgb {
        let columns = places(source.width, width)
        let rows = places(source.height, height)
        var found = Rgb(width: width, height: height)
        var row = [UInt32](repeating: 0, count: source.width)
        for y in 0..<height {
            source.row(rows[y], into: &row)
            found.put(y, columns.map { row[$0] })
        }
        return found
    }

    /// The positions that `nearest` reads, their step added up as Pillow does.
    private func places(_ from: Int, _ to: Int) -> [Int] {
        let step = Double(from) / Double(to)
        var at = step * 0.5
        return (0..<to).map { _ in
            defer { at += step }
            return min(Int(at), from - 1)
        }
    }
}

private enum Filter: String {
    case bilinear, bicubic, lanczos

    var support: Double {
        switch self {
        case .bilinear: 1
        case .bicubic: 2
        case .lanczos: 3
        }
    }

    func callAsFunction(_ given: Double) -> Double {
        let x = abs(given)
        switch self {
        case .bilinear: return x < 1 ? 1 - x : 0
        case .bicubic:
            let a = -0.5
            if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
            return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0
        case .lanczos: return given >= -3 && given < 3 ? sinc(given) * sinc(given / 3) : 0
        }
    }

    private func sinc(_ x: Double) -> Double { x == 0 ? 1 : sin(x * .pi) / (x * .pi) }
}

/// A picture of interleaved red, green and blue bytes.
private struct Rgb: Raster {
    let width: Int
    let height: Int
    var bytes: [UInt8]

    init(width: Int, height: Int) {
        (self.width, self.height) = (width, height)
        bytes = [UInt8](repeating: 0, count: 3 * width * height)
    }

    func row(_ y: Int, into row: inout [UInt32]) {
        let start = 3 * width * y
        for x in 0..<width {
            let at = start + 3 * x
            row[x] = UInt32(bytes[at]) << 16 | UInt32(bytes[at + 1]) << 8 | UInt32(bytes[at + 2])
        }
    }

    mutating func put(_ y: Int, _ row: [UInt32]) {
        let start = 3 * width * y
        for x in 0..<width {
            let color = row[x]
            bytes[start + 3 * x] = UInt8(truncatingIfNeeded: color >> 16)
            bytes[start + 3 * x + 1] = UInt8(truncatingIfNeeded: color >> 8)
            bytes[start + 3 * x + 2] = UInt8(truncatingIfNeeded: color)
        }
    }
}

/// Its transparency laid on white, as Pillow's `alpha_composite` computes it.
private struct OpaqueRows: Raster {
    let picture: any Raster

    var width: Int { picture.width }
    var height: Int { picture.height }

    func row(_ y: Int, into row: inout [UInt32]) {
        picture.row(y, into: &row)
        for x in 0..<width {
            let alpha = row[x] >> 24
            if alpha == 255 { continue }
            let over = alpha == 0 ? 0 : ((alpha * 255 * 255) << 7) / 65025
            let under = (255 << 7) - over
            var color: UInt32 = 0
            for shift in [UInt32(16), 8, 0] {
                let sum = (row[x] >> shift & 255) * over + 255 * under + (0x80 << 7)
                color |= (((sum >> 8) + sum) >> 15) << shift
            }
            row[x] = color
        }
    }
}

/// In the middle of a square; where the margins cannot be equal, the first is the smaller.
private struct Padded: Raster {
    let picture: OpaqueRows
    let side: Int
    let color: UInt32

    var width: Int { side }
    var height: Int { side }

    func row(_ y: Int, into row: inout [UInt32]) {
        let (left, top) = ((side - picture.width) / 2, (side - picture.height) / 2)
        for x in 0..<side { row[x] = color }
        guard (0..<picture.height).contains(y - top) else { return }
        if left == 0 { return picture.row(y - top, into: &row) }
        var inner = [UInt32](repeating: 0, count: picture.width)
        picture.row(y - top, into: &inner)
        row.replaceSubrange(left..<left + picture.width, with: inner)
    }
}

/// What each place of a resized line takes of the line that it comes from, in fixed point.
private struct Weights {
    private static let bits: Int32 = 22
    private static let one = Double(1 << 22)
    private static let half: Int32 = 1 << 21

    let size: Int
    private var firsts: [Int] = []
    private var weights: [[Int32]] = []

    init(from: Int, size: Int, _ filter: Filter) {
        self.size = size
        let scale = Double(from) / Double(size)
        let filterScale = max(scale, 1)
        let support = filter.support * filterScale
        for place in 0..<size {
            let center = (Double(place) + 0.5) * scale
            let first = max(Int(center - support + 0.5), 0)
            let last = min(Int(center + support + 0.5), from)
            firsts.append(first)
            let step = 1 / filterScale
            let shares = (0..<last - first).map { filter((Double($0 + first) - center + 0.5) * step) }
            var sum = 0.0
            for share in shares { sum += share }
            weights.append(
                shares.map { given in
                    let share = (sum != 0 ? given / sum : given) * Self.one
                    return Int32(share < 0 ? share - 0.5 : share + 0.5)
                })
        }
    }

    func horizontal(_ row: [UInt32], _ found: inout Rgb, _ y: Int) {
        let start = 3 * size * y
        row.withUnsafeBufferPointer { row in
            found.bytes.withUnsafeMutableBufferPointer { bytes in
                for place in 0..<size {
                    let first = firsts[place]
                    var (red, green, blue) = (Self.half, Self.half, Self.half)
                    weights[place].withUnsafeBufferPointer { shares in
                        for index in 0..<shares.count {
                            let (color, share) = (row[first + index], shares[index])
                            red &+= Int32(color >> 16 & 255) &* share
                            green &+= Int32(color >> 8 & 255) &* share
                            blue &+= Int32(color & 255) &* share
                        }
                    }
                    bytes[start + 3 * place] = Self.clip(red)
                    bytes[start + 3 * place + 1] = Self.clip(green)
                    bytes[start + 3 * place + 2] = Self.clip(blue)
                }
            }
        }
    }

    func vertical(_ source: Rgb) -> Rgb {
        let line = 3 * source.width
        var found = Rgb(width: source.width, height: size)
        var sums = [Int32](repeating: 0, count: line)
        source.bytes.withUnsafeBufferPointer { from in
            found.bytes.withUnsafeMutableBufferPointer { to in
                sums.withUnsafeMutableBufferPointer { sums in
                    for place in 0..<size {
                        sums.update(repeating: Self.half)
                        for (index, share) in weights[place].enumerated() {
                            let start = line * (firsts[place] + index)
                            for x in 0..<line { sums[x] &+= Int32(from[start + x]) &* share }
                        }
                        for x in 0..<line { to[line * place + x] = Self.clip(sums[x]) }
                    }
                }
            }
        }
        return found
    }

    private static func clip(_ sum: Int32) -> UInt8 { UInt8(min(max(sum >> bits, 0), 255)) }
}
