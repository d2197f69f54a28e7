-- The blocks of the remote tier: every change of them and of their index, each call one atomic step.
--
--   ARGV: operation, prefix, namespace (16 bytes), then what the operation takes
--   b:MEMBER        a block's record; expires when it was not used for its time to live
--   meta:NAMESPACE  hash: block hash -> "exact:size:number:owner"
--   lru:OWNER       sorted set: MEMBER by the number of its last use
--   bytes           hash: owner -> bytes
--   state           hash: clock, total, floor, swept, passed:OWNER, scanned:NAMESPACE, cleared:NAMESPACE, key: drawn once; it
--                   distinguishes this server from others
--   removed         sorted set: MEMBER by the number of its removal; state has floor, up to which this lacks some, settled, the
--                   same where partial blocks have gone with all that it lacks, and else left, up to which some may not have
--   lost:NAMESPACE  sorted set: hashes of blocks that are gone though no process of the namespace asked for it, by the
--                   number of their loss; the last ones
--   spaces          set: every namespace
--   partial:NAMESPACE  hash: hash of a partial block -> its parent, the full block before it (32 bytes each), its number of
--                   tokens (4 bytes), and what stands for all partial blocks of its parent in a removal (32 bytes)
--   named:NAMESPACE and a name, set: hashes of the partial blocks that a removal of that name takes along
--   stored:NAMESPACE, gone:NAMESPACE  sorted sets: hashes of partial blocks by the number of their store, and of those that
--                   are gone or were before they were stored again, the last ones, by the number of their end; state has for
--                   each namespace changed:NAMESPACE and ended:NAMESPACE, the last number in either and the last end, and
--                   forgotten:NAMESPACE, up to which gone:NAMESPACE lacks some
--
-- A MEMBER is a namespace and a block hash. Numbers come from one clock: microseconds, and always rising, also after a
-- FLUSHALL. A store says which removals its process knew of when the block was made; if the block was removed later, or
-- that is not known any more, it is refused.

local REMEMBERED = 10000
local SCANNED = 500
local SWEEP_MICROSECONDS = 500000
local SWEPT_AT_ONCE = 1000
local REMEMBERED_LOSSES = 20000
local REMEMBERED_LOSSES_MS = 600000
local REPORTED_AT_ONCE = 2000

local operation, prefix, space = ARGV[1], ARGV[2], ARGV[3]
local STATE, BYTES, REMOVED, SPACES = prefix .. 'state', prefix .. 'bytes', prefix .. 'removed', prefix .. 'spaces'

local last = tonumber(redis.call('HGET', STATE, 'clock') or 0)
local time = redis.call('TIME')
local now = math.max(last + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))
local total = tonumber(redis.call('HGET', STATE, 'total') or 0)
local owned = {}

local function text(number)
  return string.format('%.0f', number)
end

-- Beyond maxmemory, a script may go on if its first write is one that needs no memory.
local function allow_growth()
  redis.call('DEL', prefix .. 'nothing')
end

local function space_of(member)
  return string.sub(member, 1, 16), string.sub(member, 17)
end

local function meta(member)
  local name, hash = space_of(member)
  local found = redis.call('HGET', prefix .. 'meta:' .. name, hash)
  if not found then
    return nil
  end
  local exact, size, number, owner = string.match(found, '^([01]):(%d+):(%d+):(.*)$')
  if not exact then
    return nil
  end
  return { exact = exact == '1', size = tonumber(size), number = tonumber(number), owner = owner }
end

local function add_bytes(owner, size)
  total = total + size
  owned[owner] = (owned[owner] or 0) + size
  if redis.call('HINCRBY', BYTES, owner, size) <= 0 then
    redis.call('HDEL', BYTES, owner)
  end
end

-- What names a partial block in a removal, its own hash aside; nothing for a full one, whose place is ''.
local function names_of(place)
  if place == '' then
    return {}
  end
  return { string.sub(place, 33, 64), string.sub(place, 69, 100) }
end

local function add_partial(name, hash, place)
  redis.call('HSET', prefix .. 'partial:' .. name, hash, place)
  for _, each in ipairs(names_of(place)) do
    redis.call('SADD', prefix .. 'named:' .. name .. each, hash)
  end
  redis.call('ZADD', prefix .. 'stored:' .. name, text(now), hash)
  redis.call('HSET', STATE, 'changed:' .. name, text(now))
end

-- The number of the last change of the namespace's partial blocks.
local function last_change()
  return text(tonumber(redis.call('HGET', STATE, 'changed:' .. space) or 0))
end

-- Up to which number it is not known any more which partial blocks have ended: gone:NAMESPACE expires as a whole, and the
-- server may take it away.
local function forgotten(name)
  local numbers = redis.call('HMGET', STATE, 'forgotten:' .. name, 'ended:' .. name)
  local kept = redis.call('EXISTS', prefix .. 'gone:' .. name) == 1
  return math.max(tonumber(numbers[1] or 0), not kept and tonumber(numbers[2] or 0) or 0)
end

-- Whether it was a partial block, which is not in the index of these any more.
local function drop_partial(name, hash)
  local place = redis.call('HGET', prefix .. 'partial:' .. name, hash)
  if not place then
    return false
  end
  now = now + 1
  for _, each in ipairs(names_of(place)) do
    redis.call('SREM', prefix .. 'named:' .. name .. each, hash)
  end
  redis.call('HDEL', prefix .. 'partial:' .. name, hash)
  redis.call('ZREM', prefix .. 'stored:' .. name, hash)
  local gone = prefix .. 'gone:' .. name
  if redis.call('EXISTS', gone) == 0 then
    redis.call('HSET', STATE, 'forgotten:' .. name, text(forgotten(name)))
  end
  redis.call('ZADD', gone, text(now), hash)
  local surplus = redis.call('ZCARD', gone) - REMEMBERED_LOSSES
  if surplus > 0 then
    local newest = redis.call('ZRANGE', gone, surplus - 1, surplus - 1, 'WITHSCORES')
    redis.call('HSET', STATE, 'forgotten:' .. name, text(tonumber(newest[2])))
    redis.call('ZREMRANGEBYRANK', gone, 0, surplus - 1)
  end
  redis.call('PEXPIRE', gone, REMEMBERED_LOSSES_MS)
  redis.call('HSET', STATE, 'changed:' .. name, text(now), 'ended:' .. name, text(now))
  return true
end

-- The least recent entry of each owner, by owner; `victim` fills it in as needed.
local candidates = {}

-- Whether it was a full block.
local function drop(member, entry)
  candidates[entry.owner] = nil
  local name, hash = space_of(member)
  redis.call('DEL', prefix .. 'b:' .. member)
  redis.call('ZREM', prefix .. 'lru:' .. entry.owner, member)
  redis.call('HDEL', prefix .. 'meta:' .. name, hash)
  add_bytes(entry.owner, -entry.size)
  return not drop_partial(name, hash)
end

-- As `drop`, of a block whose namespace's processes do not know that it goes: the next `state` of each of them reports it,
-- if it was a full one.
local function lose(member, entry)
  if not drop(member, entry) then
    return
  end
  local name, hash = space_of(member)
  local losses = prefix .. 'lost:' .. name
  now = now + 1
  redis.call('ZADD', losses, text(now), hash)
  redis.call('ZREMRANGEBYSCORE', losses, '-inf', text(now - REMEMBERED_LOSSES_MS * 1000))
  redis.call('ZREMRANGEBYRANK', losses, 0, -REMEMBERED_LOSSES - 1)
  redis.call('PEXPIRE', losses, REMEMBERED_LOSSES_MS)
end

-- The entry of a member; nil where its record has expired, or was taken away by the server.
local function present(member)
  local entry = meta(member)
  if entry and redis.call('EXISTS', prefix .. 'b:' .. member) == 0 then
    lose(member, entry)
    return nil
  end
  return entry
end

-- A process whose time to live is shorter than another's does not shorten the block's.
local function use(member, entry, number, ttl)
  if redis.call('PTTL', prefix .. 'b:' .. member) < ttl then
    redis.call('PEXPIRE', prefix .. 'b:' .. member, ttl)
  end
  redis.call('ZADD', prefix .. 'lru:' .. entry.owner, text(number), member)
end

local function oldest(owner)
  while true do
    local member = redis.call('ZRANGE', prefix .. 'lru:' .. owner, 0, 0, 'WITHSCORES')
    if not member[1] then
      return nil
    end
    local entry = meta(member[1])
    if entry then
      return { member = member[1], entry = entry, number = tonumber(member[2]) }
    end
    redis.call('ZREM', prefix .. 'lru:' .. owner, member[1])
  end
end

-- Whose least recently used block goes for one of `owner`. With shares, of the owner with most above its floor; else of
-- any.
local function victim(owner, shares)
  local best, best_rank = nil, nil
  for each, bytes in pairs(owned) do
    if bytes > 0 and candidates[each] == nil then
      candidates[each] = oldest(each) or false
    end
    local candidate = bytes > 0 and candidates[each]
    if candidate then
      local rank = -candidate.number
      if next(shares) ~= nil then
        rank = bytes - candidate.entry.size - (shares[each] and shares[each][1] or 0)
      end
      if (next(shares) == nil or rank >= 0) and (best == nil or rank > best_rank) then
        best, best_rank = candidate, rank
      end
    end
  end
  return best or candidates[owner] or nil
end

local function make_room(owner, size, limit, shares, evicted)
  local quota = shares[owner] and shares[owner][2] or -1
  if quota >= 0 and size > quota then
    return false
  end
  while true do
    local evictable
    if quota >= 0 and (owned[owner] or 0) + size > quota then
      evictable = oldest(owner)
    elseif total + size > limit then
      evictable = victim(owner, shares)
    else
      return true
    end
    if not evictable then
      return false
    end
    if space_of(evictable.member) == space then
      if drop(evictable.member, evictable.entry) then
        evicted[#evicted + 1] = string.sub(evictable.member, 17)
      else
        evicted.others = evicted.others + 1
      end
    else
      lose(evictable.member, evictable.entry)
      evicted.others = evicted.others + 1
    end
  end
end

-- Of the blocks that were not used for `ttl`, take those away whose records have expired; a record that another process
-- has stored may live longer. Each call goes on where the last one has ended, so that such records hold nothing up, and
-- takes no more in all than processes read of the losses meanwhile.
local function expire(ttl)
  local until_number, owners = text(now - ttl * 1000), 0
  for _ in pairs(owned) do
    owners = owners + 1
  end
  local most = math.max(1, math.floor(SWEPT_AT_ONCE / math.max(1, owners)))
  for owner, _ in pairs(owned) do
    local from = redis.call('HGET', STATE, 'passed:' .. owner)
    local found = redis.call(
      'ZRANGEBYSCORE', prefix .. 'lru:' .. owner, from and '(' .. from or '-inf', until_number,
      'WITHSCORES', 'LIMIT', 0, most
    )
    for at = 1, #found, 2 do
      present(found[at])
    end
    if #found == 2 * most then
      redis.call('HSET', STATE, 'passed:' .. owner, text(tonumber(found[#found])))
    elseif from then
      redis.call('HDEL', STATE, 'passed:' .. owner)
    end
  end
end

-- Of the index of partial blocks, a part at each call: those go that a process of an earlier version has evicted.
local function sweep_partial()
  local key, at_cursor = prefix .. 'partial:' .. space, 'scanned:' .. space
  local scan = redis.call('HSCAN', key, redis.call('HGET', STATE, at_cursor) or 0, 'COUNT', SCANNED)
  redis.call('HSET', STATE, at_cursor, scan[1])
  for at = 1, #scan[2], 2 do
    if not meta(space .. scan[2][at]) then
      drop_partial(space, scan[2][at])
    end
  end
end

-- The index of partial blocks goes, which all processes notice.
local function mend_partial(name)
  for _, place in ipairs(redis.call('HVALS', prefix .. 'partial:' .. name)) do
    for _, each in ipairs(names_of(place)) do
      redis.call('DEL', prefix .. 'named:' .. name .. each)
    end
  end
  redis.call('DEL', prefix .. 'partial:' .. name, prefix .. 'stored:' .. name, prefix .. 'gone:' .. name)
  redis.call('HSET', STATE, 'changed:' .. name, text(now), 'forgotten:' .. name, text(now))
end

-- Where the server has taken a part of the index away, the whole of it goes; the blocks that it had expire.
local function mend()
  local used, known, keys = 0, 0, {}
  for owner, _ in pairs(owned) do
    used = used + redis.call('ZCARD', prefix .. 'lru:' .. owner)
    keys[#keys + 1] = prefix .. 'lru:' .. owner
  end
  for _, name in ipairs(redis.call('SMEMBERS', SPACES)) do
    known = known + redis.call('HLEN', prefix .. 'meta:' .. name)
    keys[#keys + 1] = prefix .. 'meta:' .. name
  end
  if used ~= known then
    for _, name in ipairs(redis.call('SMEMBERS', SPACES)) do
      mend_partial(name)
    end
    redis.call('DEL', BYTES, SPACES, unpack(keys))
    owned, total = {}, 0
    return 1
  end
  return 0
end

local function was_removed(member, seen)
  local number = redis.call('ZSCORE', REMOVED, member)
  return number and tonumber(number) > seen
end

-- As `was_removed`, of any of the names.
local function were_removed(names, seen)
  for _, name in ipairs(names) do
    if was_removed(space .. name, seen) then
      return true
    end
  end
  return false
end

-- Up to which number a process of an earlier version has let the server forget removals, whose partial blocks it has left.
local function left_until()
  local numbers = redis.call('HMGET', STATE, 'floor', 'settled', 'left')
  return math.max(numbers[1] ~= numbers[2] and tonumber(numbers[1]) or 0, tonumber(numbers[3] or 0))
end

-- The oldest removals are not remembered any more: partial blocks that a process of an earlier version has left go now.
local function forget_removals(count)
  local forgotten_names = redis.call('ZRANGE', REMOVED, 0, count - 1, 'WITHSCORES')
  for at = 1, #forgotten_names, 2 do
    local space_name, name = space_of(forgotten_names[at])
    for _, hash in ipairs(redis.call('SMEMBERS', prefix .. 'named:' .. space_name .. name)) do
      local entry = meta(space_name .. hash)
      if entry and entry.number < tonumber(forgotten_names[at + 1]) then
        drop(space_name .. hash, entry)
      end
    end
  end
  local floor = text(tonumber(forgotten_names[2 * count]))
  redis.call('HSET', STATE, 'left', text(left_until()), 'floor', floor, 'settled', floor)
  redis.call('ZREMRANGEBYRANK', REMOVED, 0, count - 1)
end

-- Where a block lies that is there; '' for a full one, and nil for a partial one that a removal would not find, or that
-- a process of an earlier version has left, or may have, when it removed the block before it.
local function place_of(hash, entry)
  local place = redis.call('HGET', prefix .. 'partial:' .. space, hash)
  if not place then
    return ''
  end
  for _, name in ipairs(names_of(place)) do
    if redis.call('SISMEMBER', prefix .. 'named:' .. space .. name, hash) == 0 then
      return nil
    end
  end
  if entry.number < left_until() or were_removed(names_of(place), entry.number) then
    return nil
  end
  return place
end

local operations = {}

-- seen, bytes, time to live (ms), shares (JSON: owner -> [floor, quota or -1]); then hash, exact, owner, size, record and
-- place of each block, as in partial:NAMESPACE, '' for a full one. -> kept, refused for lack of room, refused as removed,
-- evicted of other namespaces or partial, evicted hashes of others
operations.store = function()
  local seen, limit, ttl = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
  local shares, evicted = cjson.decode(ARGV[7]), { others = 0 }
  local kept, no_room, removed = 0, 0, 0
  local cleared = tonumber(redis.call('HGET', STATE, 'cleared:' .. space) or 0)
  local floor = math.max(cleared, tonumber(redis.call('HGET', STATE, 'floor') or 0))
  for at = #ARGV - 5, 8, -6 do
    local hash, exact, owner, size = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
    local member, place = space .. hash, ARGV[at + 5]
    local entry = present(member)
    if entry and place_of(hash, entry) ~= place then
      drop(member, entry)
      entry = nil
    end
    now = now + 1
    if entry and (entry.exact or exact == '0') then
      use(member, entry, now, ttl)
      candidates[entry.owner] = nil
      kept = kept + 1
    elseif floor > seen or was_removed(member, seen) or were_removed(names_of(place), seen) then
      removed = removed + 1
    else
      if entry then
        drop(member, entry)
      end
      if make_room(owner, size, limit, shares, evicted) then
        redis.call('SET', prefix .. 'b:' .. member, ARGV[at + 4], 'PX', ttl)
        redis.call('SADD', SPACES, space)
        redis.call('ZREM', prefix .. 'lost:' .. space, hash)
        redis.call('HSET', prefix .. 'meta:' .. space, hash, table.concat({ exact, ARGV[at + 3], text(now), owner }, ':'))
        redis.call('ZADD', prefix .. 'lru:' .. owner, text(now), member)
        if place ~= '' then
          add_partial(space, hash, place)
        end
        add_bytes(owner, size)
        candidates[owner] = nil
        kept = kept + 1
      else
        no_room = no_room + 1
      end
    end
  end
  return { kept, no_room, removed, evicted.others, evicted }
end

-- time to live (ms), hashes: the first becomes the most recent. -> "exact:owner" of each full block, "2:" with place and
-- owner of each partial one, "" where it is not there
operations.use = function()
  allow_growth()
  local found = {}
  now = now + #ARGV - 4
  local first = now
  for at = 5, #ARGV do
    local hash, described = ARGV[at], ''
    local entry = present(space .. hash)
    local place = entry and place_of(hash, entry)
    if place then
      use(space .. hash, entry, first - at + 5, tonumber(ARGV[4]))
      described = (place ~= '' and '2:' .. place or entry.exact and '1:' or '0:') .. entry.owner
    elseif entry then
      lose(space .. hash, entry)
    else
      drop_partial(space, hash) -- which a process of an earlier version may have evicted
    end
    found[at - 4] = described
  end
  return found
end

-- hashes -> how many full blocks were there. What others have of these blocks may be stored
operations.drop = function()
  allow_growth()
  local count = 0
  for at = 4, #ARGV do
    local entry = present(space .. ARGV[at])
    if entry and drop(space .. ARGV[at], entry) then
      count = count + 1
    end
  end
  return count
end

-- hashes and other names, which take partial blocks along -> how many full blocks were there
operations.remove = function()
  allow_growth()
  if redis.call('EXISTS', prefix .. 'partial:' .. space) == 1 then
    for at = 4, #ARGV do
      for _, hash in ipairs(redis.call('SMEMBERS', prefix .. 'named:' .. space .. ARGV[at])) do
        local entry = meta(space .. hash)
        if entry then
          drop(space .. hash, entry)
        end
      end
    end
  end
  local count = operations.drop()
  for at = 4, #ARGV do
    redis.call('ZADD', REMOVED, text(now), space .. ARGV[at])
  end
  local surplus = redis.call('ZCARD', REMOVED) - REMEMBERED
  if surplus > 0 then
    forget_removals(surplus)
  end
  return count
end

-- number of the clear ("" to begin one), cursor -> number, next cursor, how many full blocks were removed
operations.clear = function()
  allow_growth()
  local number = tonumber(ARGV[4])
  if not number then
    number = now
    redis.call('HSET', STATE, 'cleared:' .. space, text(number))
  end
  local scan, count = redis.call('HSCAN', prefix .. 'meta:' .. space, ARGV[5], 'COUNT', SCANNED), 0
  for at = 1, #scan[2], 2 do
    local member = space .. scan[2][at]
    local entry = meta(member)
    if entry and entry.number < number and drop(member, entry) then
      count = count + 1
    end
  end
  return { text(number), scan[1], count }
end

-- time to live (ms), number of the last loss that the process knows of ("" for none), a key for a server that has none:
-- forget what has expired, once in a while over all processes -> 1 where the index was begun anew, the number of the last
-- loss that is given or was before the first call, hashes of full blocks that were lost after the one known, the server's
-- key, the number of the last change of partial blocks
operations.state = function()
  allow_growth()
  local mended = 0
  if now - tonumber(redis.call('HGET', STATE, 'swept') or 0) >= SWEEP_MICROSECONDS then
    redis.call('HSET', STATE, 'swept', text(now))
    expire(tonumber(ARGV[4]))
    sweep_partial()
    mended = mend()
  end
  redis.call('HSETNX', STATE, 'key', ARGV[6])
  local key = redis.call('HGET', STATE, 'key')
  local known, losses = tonumber(ARGV[5]), {}
  if not known or known > now then
    return { mended, text(now), losses, key, last_change() }
  end
  local found = redis.call(
    'ZRANGEBYSCORE', prefix .. 'lost:' .. space, '(' .. text(known), '+inf', 'WITHSCORES', 'LIMIT', 0, REPORTED_AT_ONCE
  )
  for at = 1, #found, 2 do
    losses[#losses + 1] = found[at]
    known = tonumber(found[at + 1])
  end
  return { mended, text(known), losses, key, last_change() }
end

-- the number up to which the process knows of partial blocks, 0 for none, and where it reads all of them, the number of the
-- last change before it began, else 0 -> 1 where it has to forget these first, the number up to which this answers, the
-- number of the last change, 1 where there may be more, hash, place and owner of each block stored since, hashes of those gone
operations.partial = function()
  local known, stored, gone, number, more = tonumber(ARGV[4]), {}, {}, now, 0
  -- What it has read since it began was there then, so that it needs to learn only of later ends.
  local reached = math.max(known, tonumber(ARGV[5]))
  local forget = reached < forgotten(space) or reached > now
  if forget or known == 0 then
    known, reached = 0, now
  end
  for key, hashes in pairs({ stored = stored, gone = gone }) do
    local from = '(' .. text(hashes == stored and known or reached)
    local found = redis.call(
      'ZRANGEBYSCORE', prefix .. key .. ':' .. space, from, '+inf', 'WITHSCORES', 'LIMIT', 0, REPORTED_AT_ONCE
    )
    for at = 1, #found, 2 do
      hashes[#hashes + 1] = found[at]
    end
    if #found == 2 * REPORTED_AT_ONCE then
      number, more = math.min(number, tonumber(found[#found])), 1
    end
  end
  local described = {}
  for _, hash in ipairs(stored) do
    local entry, place = meta(space .. hash), redis.call('HGET', prefix .. 'partial:' .. space, hash)
    if entry and place then
      described[#described + 1] = hash
      described[#described + 1] = place
      described[#described + 1] = entry.owner
    end
  end
  return { forget and 1 or 0, text(number), last_change(), more, described, gone }
end

local all = redis.call('HGETALL', BYTES)
for at = 1, #all, 2 do
  owned[all[at]] = tonumber(all[at + 1])
end
-- One that changes nothing writes nothing, so that a server beyond maxmemory answers it, and has no number of its own.
local reads = operation == 'partial'
if reads then
  now = last
end
local result = operations[operation]()
if not reads then
  redis.call('HSET', STATE, 'clock', text(now), 'total', text(total))
end
local entries, owners = 0, redis.call('HGETALL', BYTES)
for _, name in ipairs(redis.call('SMEMBERS', SPACES)) do
  entries = entries + redis.call('HLEN', prefix .. 'meta:' .. name)
end
return { result, text(now), entries, total, owners, redis.call('HLEN', prefix .. 'meta:' .. space) }
